"""Blocks computed again in the backward pass: the same bits, less kept."""

import pytest
import torch

from remixdit.diffusion.dit import DiT
from remixdit.mixture.remix import remix
from remixdit.training.run import read_metrics
from tests.command_line import remixdit
from tests.processes import assert_equal_runs
from tests.tiny import batch, perturb, saved_bytes, tiny_dit


def collected(network: DiT, images: list[int]) -> list[torch.Tensor]:
    """Return the gradients of a remixed network, its images routed as given."""
    experts = remix(network, 3, 5)
    perturb(experts)
    with experts.route(images):
        torch.autograd.backward(network(*batch(network, len(images))).square().mean())
    return [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images", [[2, 2, 2], [0, 0, 4, 4], [4, 0, 1, 0], [0, 1, 2, 3, 4, 4]])
def test_gradients_are_the_same_bit_for_bit(images, dtype):
    found = []
    for recompute in (False, True):
        network = tiny_dit()
        network.recompute = recompute
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            found.append(collected(network, images))
    for kept, again in zip(*found, strict=True):
        assert torch.equal(kept, again)
    assert all(values.abs().max() > 0 for values in found[0])


def test_gradients_are_the_same_compiled():
    torch._dynamo.reset()
    found = []
    for recompute in (False, True):
        network = tiny_dit()
        network.recompute = recompute
        for block in network.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        found.append(collected(network, [0, 0, 4, 4]))
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
    assert_equal_runs(tmp_path / "kept", tmp_path / "again", 6)


def test_a_run_goes_on_with_it(data, tmp_path):
    line = (
        f"train tiny --data {data} --experts-per-step 1 --output-dir {tmp_path}/run --log-every 1"
    )
    remixdit(f"{line} --steps 2")
    remixdit(f"{line} --steps 4 --recompute")
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
