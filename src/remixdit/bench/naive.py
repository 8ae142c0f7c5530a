"""Mixing as it is usually written, to measure ours against: a private reference.

Every mixed linear holds its K bases as one parameter and mixes them at each forward, autograd
forms the gradients of all bases, torch's AdamW updates them, and a loop averages the weights. The M
experts of a step run sequentially, each on its own images; their gradients are accumulated.

Shapes: K bases, N experts, M experts of a step.
"""

import copy
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remixdit.diffusion.dit import DiT
from remixdit.diffusion.noise import Diffusion, Flow
from remixdit.mixture.coefficients import initial_table
from remixdit.training.plan import Inputs
from remixdit.training.step import micro_batches

__all__ = ["NaiveMixture", "NaiveUpdate", "naive_gradients"]


class MixedLinear(nn.Module):
    """A linear whose weights are mixed at every forward."""

    def __init__(self, linear: nn.Linear, mixture: "NaiveMixture") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([linear.weight.detach()] * mixture.num_bases))
        self.bias = nn.Parameter(torch.stack([linear.bias.detach()] * mixture.num_bases))
        self.mixture = mixture

    def forward(self, inputs: Tensor) -> Tensor:
        """Mix and apply: (..., I) => (..., O)."""
        weight = torch.einsum("k,koi->oi", self.mixture.coefficients, self.weight)
        bias = torch.einsum("k,ko->o", self.mixture.coefficients, self.bias)
        return F.linear(inputs, weight, bias)


class NaiveMixture:
    """A DiT whose attention and MLP linears are mixed one by one.

    Args:
        network: Is changed: its linears are replaced.
        num_bases: K.
        num_experts: N.
    """

    def __init__(self, network: DiT, num_bases: int, num_experts: int) -> None:
        device = next(network.parameters()).device
        self.network, self.num_bases = network, num_bases
        table = initial_table(num_bases, num_experts, "softmax", 8.0)
        self.logits = nn.Parameter(table.to(device))
        for block in network.blocks:
            for part, name in (("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2")):
                owner = block.get_submodule(part)
                linear = owner.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                setattr(owner, name, MixedLinear(linear, self))
        self.choose(0)

    def choose(self, expert: int) -> None:
        """Let the network be an expert in [0, N) from now on."""
        # A tensor: compiled code would guard the value of an integer.
        self.coefficients = self.logits[expert].softmax(-1)  # (K,)


class NaiveUpdate:
    """Clipping, torch's AdamW and the average of a naive mixture, parameter by parameter."""

    def __init__(self, mixture: NaiveMixture, learning_rate: float = 1e-4) -> None:
        self.weights = list(mixture.network.parameters())
        groups: list[dict[str, Any]] = [
            {"params": self.weights},
            {"params": [mixture.logits], "lr": 1e-2},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.0)
        self.averaged = copy.deepcopy([weight.detach() for weight in self.weights])

    def take(self, max_grad_norm: float = 1.0, ema_decay: float = 0.9999) -> None:
        """Clip, step, average."""
        nn.utils.clip_grad_norm_(self.weights, max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, weight in zip(self.averaged, self.weights, strict=True):
                average.mul_(ema_decay).add_(weight, alpha=1 - ema_decay)


def naive_gradients(
    mixture: NaiveMixture,
    process: Diffusion | Flow,
    inputs: Inputs,
    micro_batch_size: int = 0,
    precision: torch.dtype = torch.float32,
) -> None:
    """Accumulate the gradients of a step, expert by expert.

    Args:
        mixture: Its network and logits get the gradients.
        process: Noise and loss.
        inputs: (b, ...) images sorted by expert, on the CPU.
        micro_batch_size: Images that run at once; 0 for all images of an expert.
        precision: Precision of the arithmetic.
    """
    device = mixture.logits.device
    for expert, images in by_expert(inputs):
        for part, _ in micro_batches(images, micro_batch_size):
            own = part.to(device)
            mixture.choose(expert)
            noisy = process.add_noise(own.latents, own.noise, own.timesteps)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                timesteps = process.network_timesteps(own.timesteps)
                output = mixture.network(noisy, timesteps, own.class_labels)
            loss = process.loss(output, own.latents, own.noise, own.timesteps)
            torch.autograd.backward((loss.total * own.weights).sum())


def by_expert(inputs: Inputs) -> Iterator[tuple[int, Inputs]]:
    """Yield each expert of a step, and its images."""
    start = 0
    for expert, same in groupby(inputs.strata.tolist()):
        stop = start + len(list(same))
        yield expert, inputs.rows(start, stop)
        start = stop
