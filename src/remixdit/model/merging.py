"""N experts become one plain network, a convex combination of their weights.

    merged = sum_n weights[n] * expert[n],    weights >= 0, sum(weights) = 1

Experts are linear in their coefficients, so this is one mix of the bases, at any N.

Shapes: K bases, N experts, L coefficient tables.
"""

from dataclasses import replace

import torch
from torch import Tensor

from remixdit.model.model import RemixDiT

__all__ = ["merged", "mixed_rows", "shares"]


def shares(model: RemixDiT) -> Tensor:
    """Return (N,) float64, each expert's share of the timesteps."""
    return torch.tensor(model.intervals.masses, dtype=torch.float64)


@torch.no_grad()
def mixed_rows(tables: Tensor, weights: Tensor) -> Tensor:
    """Return the (L, K) coefficients of a combination (N,) of experts with (L, N, K)."""
    return torch.einsum("lnk,n->lk", tables.double(), weights.double()).to(tables.dtype)


@torch.no_grad()
def merged(model: RemixDiT, weights: Tensor) -> RemixDiT:
    """Return a model of one plain network, K = N = 1.

    Args:
        model: Mixture, which stays as it is.
        weights: (N,) weights of its experts, at least 0, of sum 1.
    """
    rows = mixed_rows(model.experts.coefficients(), weights.to(model.device))
    network = model.experts.combined(rows).requires_grad_(True)  # low-rank bases froze it
    config = replace(
        model.config,
        num_bases=1,
        num_experts=1,
        coefficients="softmax",
        per_block=False,
        rank=0,
        boundaries=None,
    )
    return RemixDiT(config, network).eval()  # type: ignore[arg-type]
