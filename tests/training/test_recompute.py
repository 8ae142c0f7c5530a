"""Blocks computed again on the way back: the same bits, less kept."""

from pathlib import Path

import pytest
import torch

from remixdit.diffusion.dit import DiT
from remixdit.first.mixing import Mixture
from remixdit.first.step_gradients import StepGradients
from remixdit.training.run import read_metrics
from tests.command_line import remixdit, write_npz
from tests.processes import assert_close_runs, assert_equal_runs
from tests.tiny import batch, saved_bytes, tiny_dit


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pictures."""
    return write_npz(tmp_path_factory.mktemp("data") / "pictures.npz")


def collected(network: DiT, experts: tuple[int, ...], rounds: int) -> list[torch.Tensor]:
    """Return the gradients that a mixture of the network collects in a step."""
    mixture = Mixture(network, 3, 5)
    mixture.perturb(0.5, torch.Generator().manual_seed(0))
    gradients = StepGradients(mixture)
    gradients.begin_step(len(experts), rounds)
    for expert in experts:
        gradients.begin_expert(expert)
        for seed in range(rounds):
            torch.autograd.backward(network(*batch(network, seed=seed)).square().mean())
            gradients.collect()
    dots = [values for _, values in gradients.coefficient_grads()]
    return [segment.grads for segment in mixture.segments] + dots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("experts", "rounds"), [((2,), 1), ((0, 4), 1), ((0, 4), 2), ((0, 1, 2, 3, 4), 2)]
)
def test_gradients_are_the_same_bit_for_bit(experts, rounds, dtype):
    found = []
    for recompute in (False, True):
        network = tiny_dit()
        network.blocks.to(dtype)
        network.x_embedder.to(dtype)
        network.recompute = recompute
        found.append(collected(network, experts, rounds))
    for kept, again in zip(*found, strict=True):
        assert torch.equal(kept, again)
    assert all(values.abs().max() > 0 for values in found[0])


def test_gradients_are_the_same_compiled():
    torch._dynamo.reset()
    found = []
    for recompute in (False, True):
        network = tiny_dit()
        network.recompute = recompute
        network.compile(backend="aot_eager")
        found.append(collected(network, (0, 4), 2))
    for kept, again in zip(*found, strict=True):
        torch.testing.assert_close(kept, again)


def test_only_the_input_of_each_block_is_kept():
    network = tiny_dit(input_size=16, hidden_size=32, depth=6)
    tokens = batch(network)[0].shape[0] * network.config.num_tokens
    whole = saved_bytes(network)
    network.recompute = True
    assert (
        whole - saved_bytes(network) > 6 * 18 * tokens * 32 * 4
    )  # of 20 numbers a token and width
    assert saved_bytes(network) < whole / 4


def test_nothing_is_recomputed_without_gradients():
    network = tiny_dit()
    network.recompute = True
    with torch.no_grad():
        assert torch.isfinite(network(*batch(network))).all()


@pytest.mark.parametrize("options", ["--experts-per-step 1", "--micro-batch-size 3", ""])
def test_a_run_does_not_depend_on_it(options, data, tmp_path):
    line = f"train tiny --data {data} --steps 6 --log-every 1 {options} --output-dir {tmp_path}"
    remixdit(f"{line}/kept --basis-noise 0.3 --eps 1e-4")
    remixdit(f"{line}/again --basis-noise 0.3 --eps 1e-4 --recompute")
    same = assert_equal_runs if options else assert_close_runs  # a stack gives way to turns
    same(tmp_path / "kept", tmp_path / "again", 6)


def test_a_run_goes_on_with_it(data, tmp_path):
    line = (
        f"train tiny --data {data} --experts-per-step 1 --output-dir {tmp_path}/run --log-every 1"
    )
    remixdit(f"{line} --steps 2")
    remixdit(f"{line} --steps 4 --recompute")
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
