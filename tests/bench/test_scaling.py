"""What a step is said to cost, against real models and real runs."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from remixdit.bench.config import BenchConfig, runs_of
from remixdit.bench.counting import mixed_bytes
from remixdit.bench.scaling import H100, Hardware, orthogonal_bytes, step_cost, step_seconds
from remixdit.bench.steps import NoImages, outline
from remixdit.data import Batch
from remixdit.diffusion.costs import activation_bytes, block_activation_bytes
from remixdit.diffusion.dit import DiT, DiTConfig
from remixdit.distributed.parallel import local
from remixdit.distributed.ranks import Ranks
from remixdit.mixture.product import MixedProduct
from remixdit.progress import finish
from remixdit.training.config import PRECISIONS, MixtureConfig, OutputConfig, TrainConfig
from remixdit.training.loop import open_dataset
from remixdit.training.muon import orthogonal, orthogonal_flops
from remixdit.training.optimizer import OptimizerConfig
from remixdit.training.plan import Inputs
from remixdit.training.run import read_metrics
from remixdit.training.start import outline_of, starting_model
from remixdit.training.trainer import Training
from tests.processes import launch
from tests.tiny import batch, saved_bytes, tiny_config, tiny_dit


def tiny_run(directory: Path, **fields: object) -> TrainConfig:
    """A run on twelve noisy grey images of three classes."""
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    np.savez(directory / "digits.npz", arr_0=images, arr_1=np.arange(12) % 3)
    settings = {
        "steps": 2,
        "batch_size": 12,
        "image_size": 8,
        "device": "cpu",
        "network": DiTConfig(patch_size=2, hidden_size=16, depth=2, num_heads=2),
        "mixture": MixtureConfig(num_bases=3, num_experts=5),
        "output": OutputConfig(tensorboard=False),
    }
    data = str(directory / "digits.npz")
    return TrainConfig(data=data, output_dir=directory / "run", **{**settings, **fields})


def storages(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of memory behind some tensors, what they share counted once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in found.values())


MIXTURES = {
    "one": {"mixture": MixtureConfig(num_bases=3, num_experts=5, experts_per_step=1)},
    "all": {},
    "micro-batches": {"micro_batch_size": 5},
    "everything mixed": {"mixture": MixtureConfig(num_bases=3, num_experts=5, mixed="all")},
    "a table a block": {"mixture": MixtureConfig(num_bases=3, num_experts=5, per_block=True)},
    "raw": {"mixture": MixtureConfig(num_bases=2, num_experts=5, coefficients="raw")},
    "one-hot": {"mixture": MixtureConfig(num_bases=5, num_experts=5, coefficients="one_hot")},
    "plain": {"mixture": MixtureConfig(num_bases=1, num_experts=1)},
    "muon": {"optimizer": OptimizerConfig(algorithm="muon")},
}
KEPT = ("parameters", "moments", "average", "gradients")


def kept_after_a_step(training: Training, inputs: Inputs) -> dict[str, int]:
    """Return the bytes of what a run keeps, once a step has been taken."""
    training.optimizer.zero_grad = lambda: None  # gradients stay to be counted
    training.take_step(inputs)
    network = training.model.network
    parameters = [local(parameter.detach()) for parameter in network.parameters()]
    moments = [local(v) for state in training.optimizer.state.values() for v in state.values()]
    grads = [local(p.grad) for p in network.parameters() if p.grad is not None]
    return {
        "parameters": storages([*parameters, *network.buffers()]),
        "moments": storages(moments),
        "average": storages([local(values) for values in training.average.values.values()]),
        "gradients": storages(grads),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MIXTURES)
def test_memory_is_that_of_the_tensors_of_a_real_step(name, precision, tmp_path):
    config = tiny_run(tmp_path, precision=precision, **MIXTURES[name])
    start = starting_model(config, outline_of(config))
    training = Training(
        config,
        start,
        finish(open_dataset(config, Ranks(), start.config.network.input_size)),
        Ranks(),
    )
    found = kept_after_a_step(training, next(training.batches()))
    said = step_cost(replace(config, network=start.config.network)).memory
    if name == "muon":  # lets go of the gradients of matrices as it moves them
        assert 0 < found.pop("gradients") < said["gradients"]
    assert {name: said[name] for name in found} == found
    assert said["activations"] > 0
    assert said["gathered"] == 0
    assert (said["mixed"] > 0) == (name != "plain")
    assert (said["autocast"] > 0) == (precision == "bf16" and name != "everything mixed")


@pytest.fixture
def eight_processes():
    """A group of eight processes of which this one is the first; nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield Ranks(0, 8)
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("size", [0, 2, 4])
@pytest.mark.parametrize("mixed", ["attention+mlp", "all"])
def test_memory_of_a_slice_is_that_of_the_tensors_of_fsdp(size, mixed, eight_processes):
    config = BenchConfig(
        network="32x2/2", input_size=8, num_experts=5, batch_size=16, naive=False, mixed=mixed
    )
    run = replace(runs_of(config)["remix M=5"], shard=True, shard_size=size, device="cpu")
    training = Training(run, starting_model(run, outline(run)), NoImages(), eight_processes)
    images = Batch(torch.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.long), torch.arange(2))
    found = kept_after_a_step(training, training.planner.inputs(0, images))
    cost = step_cost(run, 8)
    assert {name: cost.memory[name] for name in KEPT} == found
    assert cost.reduced_bytes == training.reduced_bytes()
    assert cost.across_bytes == (found["gradients"] if size else 0)


class Peak(TorchDispatchMode):
    """Follows the bytes of the tensors that are made inside, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for values in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(values, torch.Tensor):
                self.follow(values.untyped_storage())
        return result

    def follow(self, storage: torch.UntypedStorage) -> None:
        key, count = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += count
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, key, count)

    def forget(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.now -= count


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mixed_weights_are_those_of_one_layer_at_its_peak(precision):
    experts, rows, width = 6, 2, 96
    inputs = torch.randn(experts, rows, width, dtype=PRECISIONS[precision], requires_grad=True)
    bases = torch.randn(2, width, width, requires_grad=True)
    coefficients = torch.rand(experts, 2, requires_grad=True)
    with Peak() as peak:
        outputs = MixedProduct.apply(inputs, bases, None, coefficients, ((experts, 1),))
        torch.autograd.backward(outputs.float().square().sum())
    said = experts * width * width * mixed_bytes(precision)
    # Beside it: activations of a few rows, and in the fold the gradients of both bases.
    assert said <= peak.most <= said + 2 * bases.nbytes + 20 * inputs.numel() * 4


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        tiny_config(input_size=16, hidden_size=32, depth=3),
        tiny_config(num_classes=0, mlp_ratio=2.5),
        tiny_config(in_channels=4, patch_size=4, num_heads=4),
        DiTConfig.named("S/2", input_size=16),
    ],
    ids=["tiny", "unconditional", "patches of 4", "S/2"],
)
def test_activations_are_those_that_autograd_keeps(shape, recompute):
    network = DiT(shape)
    network.recompute = recompute
    images = len(batch(network)[0])
    assert saved_bytes(network) == images * activation_bytes(shape, 4, recompute)


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_under_autocast_are_those_that_autograd_keeps(recompute, monkeypatch):
    shape = tiny_config(input_size=8, patch_size=2, hidden_size=64, num_heads=2, depth=4)
    network = DiT(shape)
    network.recompute = recompute
    # As on a GPU: norms in float32, and attention in one piece.
    for block in network.blocks:
        for norm in (block.norm1, block.norm2):
            norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    monkeypatch.setattr("remixdit.diffusion.dit.attend", F.scaled_dot_product_attention)
    with torch.autocast("cpu", torch.bfloat16):
        found = saved_bytes(network)
    images = len(batch(network)[0])
    casts = [network.x_embedder.proj.weight]
    if not recompute:
        casts += [p for p in network.blocks.parameters() if p.ndim == 2]
    copies = sum(2 * weight.numel() for weight in casts)
    assert found == images * activation_bytes(shape, 2, recompute) + copies


def test_recomputing_needs_one_block_at_a_time():
    config = TrainConfig(data="", output_dir=Path(), mixture=MixtureConfig(experts_per_step=1))
    kept, again = (step_cost(replace(config, recompute=recompute)) for recompute in (False, True))
    block = 256 * block_activation_bytes(config.network)
    assert again.memory["activations"] - 256 * activation_bytes(config.network, 4, True) == block
    assert again.memory["activations"] < kept.memory["activations"] / 5
    assert again.flops * 3 == kept.flops * 4


@pytest.mark.parametrize(
    "network",
    [tiny_dit(input_size=16, hidden_size=64), DiT(DiTConfig.named("S/2", input_size=16))],
    ids=["tiny", "S/2"],
)
def test_operations_are_counted_as_torch_counts(network):
    config = TrainConfig(data="", output_dir=Path(), network=network.config, batch_size=80)
    latents, timesteps, labels = batch(network, size=2)
    # The counter does not know the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.autograd.backward(network(latents, timesteps, labels).square().sum())
    # What is counted too much: the first layers need no gradient of their input.
    assert step_cost(config, 40).flops == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_operations_of_muon_are_counted_as_torch_counts(shape):
    with FlopCounterMode(display=False) as counter:
        orthogonal(torch.randn(5, *shape))
    assert 5 * orthogonal_flops(shape) == counter.get_total_flops()


def test_processes_share_the_work_of_muon():
    muon = OptimizerConfig(algorithm="muon")
    alone, eight, adamw = (
        step_cost(b2(batch_size=8 * 32, optimizer=optimizer), ranks)
        for optimizer, ranks in ((muon, 1), (muon, 8), (OptimizerConfig(), 8))
    )
    assert adamw.orthogonal_flops == adamw.moves_bytes == adamw.memory["orthogonal"] == 0
    assert adamw.moved["muon"] == alone.moves_bytes == 0
    assert 0 < eight.moved["muon"] < alone.moved["muon"] < alone.moved["update"] * 4
    assert eight.orthogonal_flops == alone.orthogonal_flops / 8
    # In B/2 each of 4 bases has 4 square matrices a block and two of 4 times the width.
    square, wide = orthogonal_flops((768, 768)), orthogonal_flops((768, 3072))
    assert alone.orthogonal_flops == 12 * 4 * (4 * square + 2 * wide)
    assert eight.moves_bytes == 2 * 12 * 4 * (4 + 8) * 768**2
    assert adamw.memory["moments"] - eight.memory["moments"] == 2 * eight.moves_bytes
    # Five processes fill up what does not divide: 12 x 4 x 4 matrices as 5 x 39.
    five = step_cost(b2(batch_size=5 * 32, optimizer=muon), 5)
    assert five.moves_bytes == 2 * (5 * 39 + 4 * 5 * 10 * 2) * 768**2
    parts = step_seconds(eight, H100)
    assert parts["orthogonal"] == eight.orthogonal_flops / (0.4 * 989e12)
    assert parts["communication"] > step_seconds(adamw, H100)["communication"]


def test_muon_holds_no_more_than_is_said():
    matrices = {(96, 96): 32, (384, 96): 8}
    config = b2(optimizer=OptimizerConfig(algorithm="muon"))
    with Peak() as peak:
        for shape, count in matrices.items():
            directions = [torch.empty(1, *shape, dtype=torch.bfloat16) for _ in range(count)]
            orthogonal(torch.cat(directions), torch.bfloat16)
            del directions
    assert 0.6 * orthogonal_bytes(config, matrices, 1) < peak.most
    assert peak.most <= orthogonal_bytes(config, matrices, 1)


def config_of(run: Path) -> TrainConfig:
    """Return the run that a directory holds, as far as it matters for cost."""
    given = json.loads((run / "config.json").read_text())
    names = ("batch_size", "micro_batch_size", "precision", "shard", "shard_size", "recompute")
    return TrainConfig(
        data="",
        output_dir=run,
        network=DiTConfig(**given["network"]),
        mixture=MixtureConfig(**given["mixture"]),
        **{name: given[name] for name in names},
    )


@pytest.mark.parametrize(
    ("num_processes", "options"),
    [
        (2, "--experts-per-step 1 --num-bases 3"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (2, "--micro-batch-size 3 --mixed all --per-block"),
                (2, "--coefficients one_hot"),
                (2, "--shard --num-bases 1 --num-experts 1"),
                (4, "--shard --shard-size 2"),
            )
        ),
    ],
)
def test_bytes_sent_are_those_that_a_real_run_counts(num_processes, options, data, tmp_path):
    launch(f"train tiny --data {data} --steps 1 {options} --output-dir {tmp_path}", num_processes)
    counted = read_metrics(tmp_path)[-1]["reduced_bytes"]
    assert counted > 50_000
    assert step_cost(config_of(tmp_path), num_processes).reduced_bytes == counted


def b2(**fields: object) -> TrainConfig:
    network = DiTConfig.named("B/2")
    settings = {"data": "", "output_dir": Path(), "network": network, "precision": "bf16"}
    return TrainConfig(**{**settings, **fields})


def test_sent_gradients_depend_on_k_alone():
    plain, remix = MixtureConfig(num_bases=1, num_experts=1), MixtureConfig(num_bases=4)
    sent = {
        experts: step_cost(b2(mixture=replace(remix, experts_per_step=experts)), 8).reduced_bytes
        for experts in (0, 1, 4)
    }
    assert len(set(sent.values())) == 1
    assert 2 < sent[0] / step_cost(b2(mixture=plain), 8).reduced_bytes < 4
    assert step_cost(b2(mixture=remix), 1).reduced_bytes == 0


def test_memory_of_mixed_weights_is_that_of_one_layer_whatever_the_depth():
    xl = DiTConfig.named("XL/2")
    deep, shallow = (
        step_cost(b2(network=replace(xl, depth=depth))).memory["mixed"] for depth in (28, 2)
    )
    weight, bias = 4 * 1152 * 1152, 4 * 1152  # of the MLP's first linear
    assert deep == shallow == 20 * (weight + bias) * mixed_bytes("bf16")


def test_a_micro_batch_mixes_the_experts_that_it_holds():
    whole = step_cost(b2(batch_size=240))
    parts = step_cost(b2(batch_size=240, micro_batch_size=12))
    assert parts.backward_passes == 20
    assert parts.memory["mixed"] == whole.memory["mixed"] / 20
    assert parts.memory["activations"] == whole.memory["activations"] / 20
    assert parts.moved["accumulation"] > 0 == whole.moved["accumulation"]


def test_groups_keep_a_gth_each_and_send_a_gth_across():
    whole, every, groups = (
        step_cost(b2(batch_size=1024, **fields), 64)
        for fields in ({}, {"shard": True}, {"shard": True, "shard_size": 8})
    )
    for name in ("moments", "average", "gradients"):
        assert groups.memory[name] == pytest.approx(whole.memory[name] / 8, rel=0.01)
        assert every.memory[name] == pytest.approx(whole.memory[name] / 64, rel=0.01)
    assert whole.reduced_bytes == every.reduced_bytes == groups.reduced_bytes
    assert groups.across_bytes == pytest.approx(whole.reduced_bytes / 8, rel=0.01)
    assert every.across_bytes == whole.across_bytes == 0
    assert every.gathered_bytes == groups.gathered_bytes > whole.gathered_bytes == 0
    seconds = [step_seconds(cost, H100)["communication"] for cost in (every, groups)]
    assert seconds[1] < seconds[0] / 2


def test_seconds_are_work_over_rates():
    hardware = Hardware(
        flops_per_second=2e12,
        flops_share=0.5,
        memory_bandwidth=1e12,
        link_bandwidth=1e9,
        network_bandwidth=1e8,
        per_machine=4,
    )
    config = b2(mixture=MixtureConfig(num_bases=1, num_experts=1))
    for ranks, bandwidth in ((4, 1e9), (8, 1e8)):
        cost = step_cost(config, ranks)
        seconds = step_seconds(cost, hardware)
        assert seconds["network"] == cost.flops / 1e12
        assert seconds["passes"] == sum(cost.moved.values()) / 1e12
        sent = 2 * cost.reduced_bytes * (ranks - 1) / ranks
        assert seconds["communication"] == pytest.approx(sent / bandwidth)
        assert seconds["step"] == pytest.approx(sum(seconds.values()) / 2)


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes"):
        step_cost(b2(), 3)
    with pytest.raises(ValueError, match="shard_size must divide the 8 processes, got 3"):
        step_cost(b2(shard=True, shard_size=3), 8)
