"""The table of coefficients: its start, and each expert's own basis.

Shapes: K bases, N experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["KINDS", "check_counts", "initial_table", "own_basis_loss", "prior_bases"]

# the softmax of the logits; the logits themselves, learned; frozen, one basis for each expert
KINDS = ("softmax", "raw", "one_hot")


def check_counts(num_bases: int, num_experts: int) -> None:
    """Refuse numbers of bases and experts that make no sense."""
    for name, value in (("num_bases", num_bases), ("num_experts", num_experts)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if num_bases > num_experts:
        raise ValueError(
            f"num_bases must be at most num_experts {num_experts}, got {num_bases}: "
            "N experts are at most N different networks, so bases beyond N add only memory"
        )


def prior_bases(num_bases: int, num_experts: int) -> Tensor:
    """Return (N,) own bases of the experts, floor(n K / N)."""
    return torch.arange(num_experts) * num_bases // num_experts


def own_basis_loss(tables: Tensor) -> Tensor:
    """Return (N,) mean cross-entropies of (L, N, K) logits to each expert's own basis."""
    num_experts, num_bases = tables.shape[1:]
    own = prior_bases(num_bases, num_experts).to(tables.device)
    return -F.log_softmax(tables, -1)[:, torch.arange(num_experts), own].mean(0)


def initial_table(num_bases: int, num_experts: int, kind: str, symmetry: float) -> Tensor:
    """Return the (N, K) table at the start; raw coefficients start as those of the softmax.

        logits[n, k] = -symmetry * ((n - centre[k]) K / N)^2

    where centre[k] is the middle of the experts whose own basis is k: an expert prefers its own
    basis and shares most with its neighbours.
    """
    one_hot = F.one_hot(prior_bases(num_bases, num_experts), num_bases).float()
    if kind == "one_hot":
        return one_hot
    experts = torch.arange(num_experts, dtype=torch.float32)[:, None]
    centres = (experts * one_hot).sum(0) / one_hot.sum(0)  # (K,)
    logits = -symmetry * ((experts - centres) * num_bases / num_experts).square()
    logits -= logits.max(1, keepdim=True).values
    return logits.softmax(-1) if kind == "raw" else logits
