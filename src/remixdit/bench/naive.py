"""Mixing as it is usually written, to measure ours against: a private reference.

Every mixed linear holds its K bases as one parameter and mixes them at each forward, autograd
forms the gradient of every basis, torch's AdamW updates them all, and a loop averages them.

Shapes: K bases, N experts.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remixdit.diffusion.dit import DiT

__all__ = ["NaiveMixture"]


class MixedLinear(nn.Module):
    """A linear whose weights are mixed at every forward."""

    def __init__(
        self, linear: nn.Linear, num_bases: int, coefficients: Callable[[], Tensor]
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([linear.weight.detach()] * num_bases))
        self.bias = nn.Parameter(torch.stack([linear.bias.detach()] * num_bases))
        self.coefficients = coefficients

    def forward(self, inputs: Tensor) -> Tensor:
        """Mix and apply: (..., in) => (..., out)."""
        coefficients = self.coefficients()
        weight = torch.einsum("k,koi->oi", coefficients, self.weight)
        bias = torch.einsum("k,ko->o", coefficients, self.bias)
        return F.linear(inputs, weight, bias)


class NaiveMixture:
    """A DiT whose attention and MLP linears are mixed one by one.

    Args:
        network: Is changed: its linears are replaced.
        num_bases: K.
        num_experts: N.
        learning_rate: Of all but the logits, which take 0.01.
    """

    def __init__(
        self, network: DiT, num_bases: int, num_experts: int, learning_rate: float = 1e-4
    ) -> None:
        device = next(network.parameters()).device
        self.network, self.expert = network, 0
        self.logits = nn.Parameter(torch.zeros(num_experts, num_bases, device=device))
        for block in network.blocks:
            for part, name in (("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2")):
                owner = block.get_submodule(part)
                linear = owner.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                setattr(owner, name, MixedLinear(linear, num_bases, self.coefficients))
        weights = list(network.parameters())
        groups: list[dict[str, Any]] = [
            {"params": weights},
            {"params": [self.logits], "lr": 1e-2},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.0)
        self.averaged = copy.deepcopy([p.detach() for p in weights])

    def coefficients(self) -> Tensor:
        """Return (K,) of the active expert."""
        return self.logits[self.expert].softmax(-1)

    def update(self, max_grad_norm: float = 1.0, ema_decay: float = 0.9999) -> None:
        """Clip, step, average."""
        nn.utils.clip_grad_norm_(self.network.parameters(), max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, weight in zip(self.averaged, self.network.parameters(), strict=True):
                average.mul_(ema_decay).add_(weight, alpha=1 - ema_decay)
