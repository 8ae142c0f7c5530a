"""What a step keeps: inputs, bases and coefficients, whatever the number of experts."""

import gc
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from remixdit.mixture.remix import remix
from tests.tiny import batch, perturb, saved_bytes, tiny_dit

K, N = 4, 20


def kept_bytes(experts_per_batch: int, mixed: str) -> int:
    """Return what autograd keeps of a forward pass beside parameters."""
    network = tiny_dit(hidden_size=32, depth=3)
    experts = remix(network, K, N, mixed=mixed)
    perturb(experts)
    with experts.route(
        [n for n in range(experts_per_batch) for _ in range(20 // experts_per_batch)]
    ):
        return saved_bytes(network, batch(network, 20))


@pytest.mark.parametrize("mixed", ["attention+mlp", "all"])
def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_experts(mixed):
    one, all_of_them = (kept_bytes(count, mixed) for count in (1, N))
    network = tiny_dit(hidden_size=32, depth=3)
    mixed_bytes = sum(4 * p.numel() for n, p in network.named_parameters() if "blocks." in n)
    # 19 networks more would be 19 times that; coefficients and norms are what grows.
    assert all_of_them - one < 0.1 * mixed_bytes


def test_a_convolution_keeps_no_weights_of_its_experts():
    network = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    experts = remix(network, 2, 10, mixed="all")
    sizes = []
    for images in ([0] * 10, list(range(10))):
        with experts.route(images):
            sizes.append(saved_bytes(network, (torch.randn(10, 8, 6, 6),)))
    assert sizes[1] - sizes[0] < 4 * 64 * 64 * 9  # one weight of the larger layer


SCRIPT = """
import sys, torch
from remixdit import DiT, DiTConfig, remix
from remixdit.machine import peak_resident_bytes, reset_peak_resident, resident_bytes

torch.manual_seed(0)
network = DiT(DiTConfig(input_size=8, hidden_size=384, depth=6, num_heads=4))
experts = remix(network, 4, 20)
images = [n for n in range(20) for _ in range(1)] if sys.argv[1] == "20" else [7] * 20
inputs = torch.randn(20, 4, 8, 8), torch.arange(20), torch.arange(20)

def step():
    with experts.route(images):
        loss = network(*inputs).square().mean()
    torch.autograd.backward(loss)
    for parameter in network.parameters():
        parameter.grad = None

step()
step()
before = resident_bytes()
reset_peak_resident()
step()
layer = 4 * 4 * 384 * 384  # bytes of the weights of the largest mixed layer
print((peak_resident_bytes() - before) / layer)
"""


@pytest.mark.slow
def test_the_peak_of_all_experts_is_one_layer_of_their_weights_above_that_of_one():
    peaks = []
    own_pages = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for count in ("1", "20"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, count],
            env={**os.environ, **own_pages, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=200,
        )
        peaks.append(float(done.stdout))
    gc.collect()
    # In layers: weights of 20 experts, their gradients, and what bmm copies; never 6 blocks' worth.
    assert peaks[1] - peaks[0] < 65, peaks
