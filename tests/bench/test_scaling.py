"""What a step is said to cost, against real models and real runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from remixdit.bench.scaling import H100, Hardware, step_cost, step_seconds
from remixdit.diffusion.costs import activation_bytes, block_activation_bytes
from remixdit.diffusion.dit import DiT, DiTConfig
from remixdit.distributed.ranks import Ranks
from remixdit.training.config import MixtureConfig, OutputConfig, TrainConfig
from remixdit.training.loop import Training, open_dataset
from remixdit.training.run import read_metrics
from remixdit.training.start import outline_of, starting_model
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


def storages(*groups: list[torch.Tensor]) -> int:
    """Return the bytes of memory behind some tensors, what they share counted once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage() for group in groups for t in group}
    return sum(storage.nbytes() for storage in found.values())


MIXTURES = {
    "one": {"mixture": MixtureConfig(num_bases=3, num_experts=5, experts_per_step=1)},
    "two in one pass": {"mixture": MixtureConfig(num_bases=3, num_experts=5, experts_per_step=2)},
    "all in one pass": {},
    "all in turn": {"micro_batch_size": 2},
    "all in turn, again": {"recompute": True},
    "two in turn": {
        "mixture": MixtureConfig(num_bases=3, num_experts=5, experts_per_step=2),
        "micro_batch_size": 3,
    },
    "everything mixed": {"mixture": MixtureConfig(num_bases=3, num_experts=5, mixed="all")},
    "a table a block": {"mixture": MixtureConfig(num_bases=3, num_experts=5, per_block=True)},
    "raw": {"mixture": MixtureConfig(num_bases=2, num_experts=5, coefficients="raw")},
    "one-hot": {"mixture": MixtureConfig(num_bases=5, num_experts=5, coefficients="one_hot")},
    "plain": {"mixture": MixtureConfig(num_bases=1, num_experts=1)},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MIXTURES)
def test_memory_is_that_of_the_tensors_of_a_real_step(name, precision, tmp_path):
    config = tiny_run(tmp_path, precision=precision, **MIXTURES[name])
    model = starting_model(config, outline_of(config))
    training = Training(config, model, open_dataset(config, Ranks(), None), Ranks())
    training.take_step(next(iter(training.loader.batches(0))))
    mixture, optimizer = training.model.mixture, training.optimizer
    bases = [segment.bases for segment in mixture.segments]
    own = [segment.weights for segment in mixture.segments] + list(mixture.network.buffers())
    grads = [a for s in mixture.segments for a in (s.grads, s.scratch) if a is not None]
    said = step_cost(replace(config, network=model.config.network)).memory
    assert said.pop("activations") > 0
    assert said == {
        "bases": storages(bases, [mixture.logits]),
        "moments": storages(optimizer.exp_avg, optimizer.exp_avg_sq),
        "average": storages(optimizer.ema),
        "network": storages(bases, own) - storages(bases),
        "gradients": storages(grads),
        "stack": storages(*training.stack.leaves) if training.stack else 0,
    }


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


def test_activations_in_bfloat16_are_near_what_autograd_keeps():
    """A CPU writes attention out, which keeps the scores: few tokens here."""
    shape = tiny_config(input_size=8, patch_size=4, hidden_size=64, num_heads=2, depth=4)
    network = DiT(shape)
    network.blocks.to(torch.bfloat16)
    network.x_embedder.to(torch.bfloat16)
    assert saved_bytes(network) == pytest.approx(6 * activation_bytes(shape, 2), rel=0.02)


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
                (2, ""),
                (2, "--num-bases 3 --experts-per-step 2 --precision bf16"),
                (2, "--micro-batch-size 3 --mixed all --per-block"),
                (2, "--coefficients raw"),
                (2, "--coefficients one_hot --experts-per-step 3"),
                (2, "--num-bases 1 --num-experts 1"),
                (2, "--shard"),
                (2, "--shard --micro-batch-size 3 --precision bf16"),
                (4, "--shard --shard-size 2"),
                (4, "--shard --shard-size 2 --recompute"),
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


def test_one_expert_a_step_sends_what_a_plain_network_does_whatever_k_is():
    plain = step_cost(b2(mixture=MixtureConfig(num_bases=1, num_experts=1)), 8)
    for num_bases in (2, 16):
        mixture = MixtureConfig(num_bases=num_bases, experts_per_step=1)
        assert step_cost(b2(mixture=mixture), 8).reduced_bytes == plain.reduced_bytes
    assert step_cost(b2(mixture=mixture), 1).reduced_bytes == 0


def test_groups_keep_a_gth_each_and_send_a_gth_across():
    mixture = MixtureConfig(experts_per_step=1)
    whole, all_share, groups = (
        step_cost(b2(mixture=mixture, batch_size=1024, **fields), 64)
        for fields in ({}, {"shard": True}, {"shard": True, "shard_size": 8})
    )
    for name in ("moments", "average"):
        assert groups.memory[name] == pytest.approx(whole.memory[name] / 8, rel=1e-3)
        assert all_share.memory[name] == pytest.approx(whole.memory[name] / 64, rel=1e-3)
    assert groups.across_bytes == pytest.approx(whole.reduced_bytes / 8, rel=1e-3)
    assert all_share.across_bytes == 0
    seconds = [step_seconds(cost, H100)["communication"] for cost in (all_share, groups)]
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
        assert seconds["step"] == pytest.approx(sum(list(seconds.values())[:3]))


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes"):
        step_cost(b2(), 3)
    with pytest.raises(ValueError, match="shard_size must divide the 8 processes, got 3"):
        step_cost(b2(shard=True, shard_size=3), 8)
