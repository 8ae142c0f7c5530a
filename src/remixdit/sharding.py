"""One process's slice of the arrays that hold K of everything.

Bases, both moments and the average take 4 K times the memory of a network. Mixing and updating
them is elementwise along P, so each of R processes can keep a slice of P / R, and whole is only
the plain network:

    weights = gather(coefficients @ own bases)         each time an expert is mixed
    own gradient = slice of the sum of all gradients   after back-propagation

Both together send as much as summing the gradients for all. An inner product over P is the sum of
those over the slices.

Shapes: P numbers of a segment, a multiple of R; R processes.
"""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Shard", "total_of"]

# The older names warn from torch 2.13 on, which has others.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Shard:
    """Which slice is this process's.

    Args:
        rank: Of this process.
        num_ranks: R.
    """

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.reduced_bytes = 0
        """Of gradients that this process has handed over, since someone set it to 0."""

    def own(self, whole: Tensor) -> Tensor:
        """Return this process's slice (..., P / R) of (..., P), a view."""
        return whole.chunk(self.num_ranks, -1)[self.rank]

    def gather(self, own: Tensor, out: Tensor) -> None:
        """Write the slices (P / R) of all processes to `out`, (P)."""
        all_gather(out, own.contiguous())

    def sum_own(self, grads: Tensor) -> Tensor:
        """Return this process's slice (..., P / R) of the sum of (..., P) over all processes."""
        rows = grads.view(-1, grads.shape[-1])
        sums = rows.new_empty(len(rows), rows.shape[1] // self.num_ranks)
        for row, total in zip(rows, sums, strict=True):
            reduce_scatter(total, row)
        self.reduced_bytes += grads.nbytes
        return sums.view(*grads.shape[:-1], -1)

    def collected(self, own: Tensor) -> Tensor:
        """Return (..., P) of the slices (..., P / R), on the first process's CPU.

        The other processes get a tensor without storage. Memory of one row is needed beside.
        """
        rows, size = own.view(-1, own.shape[-1]), own.shape[-1] * self.num_ranks
        whole = torch.empty(len(rows), size, device="meta" if self.rank else "cpu", dtype=own.dtype)
        row = own.new_empty(size)
        for i, part in enumerate(rows):
            self.gather(part, row)
            if not self.rank:
                whole[i] = row
        return whole.view(*own.shape[:-1], size)


def total_of(values: Tensor, sharding: Shard | None) -> Tensor:
    """Return the sum of what each process found on its slice, such as inner products."""
    if sharding is None:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total
