"""Costs, against torch's own count."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from remixdit.diffusion.costs import forward_flops, training_flops
from remixdit.diffusion.dit import DiT
from tests.tiny import batch, tiny_config


@pytest.fixture(autouse=True)
def _plain_attention():
    # The counter does not know the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"input_size": 12, "patch_size": 4, "in_channels": 4, "num_heads": 4},
        {"learn_sigma": False, "mlp_ratio": 2.5, "depth": 3},
        {"num_classes": 0},
    ],
)
def test_forward_is_counted_as_torch_counts(changes):
    network = DiT(tiny_config(**changes))
    latents, timesteps, labels = batch(network, size=3)
    with FlopCounterMode(display=False) as counter:
        network(latents, timesteps, labels)
    assert counter.get_total_flops() == 3 * forward_flops(network.config)


def test_training_is_nearly_three_times_the_forward():
    network = DiT(tiny_config(input_size=16, hidden_size=64, depth=4))
    latents, timesteps, labels = batch(network, size=2)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(network(latents, timesteps, labels).square().sum())
    # What is counted too much: the first layers need no gradient of their input.
    assert counter.get_total_flops() == pytest.approx(training_flops(network.config, 2), rel=0.02)
