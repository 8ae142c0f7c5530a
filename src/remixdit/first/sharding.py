"""One process's slice of the arrays that hold K of everything.

Bases, both moments and the average take 4 K times the memory of a network. Mixing and updating
them is elementwise along P, so each of R processes can keep a slice of P / R, and whole is only
the plain network:

    weights = gather(coefficients @ own bases)         each time an expert is mixed
    own gradient = slice of the sum of all gradients   after back-propagation

Both together send as much as summing the gradients for all. An inner product over P is the sum of
those over the slices.

The R processes may be a part of all, such as those of one machine. Then every such group holds a
copy of everything; gradients are summed in the group first and slice by slice across the groups:

    rank          0  1  2  3
    group         0  0  1  1      gathers weights, scatters gradients
    slice         0  1  0  1      equal slices are copies: their gradients are summed

Shapes: P numbers of a segment, a multiple of R; R processes.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

__all__ = ["Shard", "shared_out", "total_of"]

# The older names warn from torch 2.13 on, which has others.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Shard:
    """Which slice is this process's.

    Args:
        rank: Of this process in its group.
        num_ranks: R.
        group: The processes that hold the other slices; None for all.
        copies: The processes that hold copies of this slice; None where there are none.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        group: dist.ProcessGroup | None = None,
        copies: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.group, self.copies = group, copies
        self.reduced_bytes = 0
        """Of gradients that this process has handed over, since someone set it to 0."""

    def own(self, whole: Tensor) -> Tensor:
        """Return this process's slice (..., P / R) of (..., P), a view."""
        return whole.chunk(self.num_ranks, -1)[self.rank]

    def gather(self, own: Tensor, out: Tensor) -> None:
        """Write the slices (P / R) of all processes to `out`, (P)."""
        all_gather(out, own.contiguous(), group=self.group)

    def sum_own(self, grads: Tensor) -> Tensor:
        """Return this process's slice (..., P / R) of the sum of (..., P) over all processes."""
        rows = grads.view(-1, grads.shape[-1])
        sums = rows.new_empty(len(rows), rows.shape[1] // self.num_ranks)
        for row, total in zip(rows, sums, strict=True):
            reduce_scatter(total, row, group=self.group)
        self.reduced_bytes += grads.nbytes
        if self.copies is not None:
            dist.all_reduce(sums, group=self.copies)
            self.reduced_bytes += sums.nbytes
        return sums.view(*grads.shape[:-1], -1)

    def collected(self, own: Tensor) -> Tensor:
        """Return (..., P) of the slices (..., P / R), on the first process's CPU.

        The other processes get a tensor without storage. Memory of one row is needed beside.
        """
        rows, size = own.view(-1, own.shape[-1]), own.shape[-1] * self.num_ranks
        is_copy = self.copies is not None and dist.get_rank(self.copies) > 0
        is_first = self.rank == 0 and not is_copy
        whole = torch.empty(len(rows), size, device="cpu" if is_first else "meta", dtype=own.dtype)
        row = own.new_empty(0 if is_copy else size)
        for i, part in enumerate(rows if not is_copy else ()):
            self.gather(part, row)
            if is_first:
                whole[i] = row
        return whole.view(*own.shape[:-1], size)


def shared_out(device_type: str, size: int) -> Shard:
    """Return this process's slice where each `size` processes in a row hold one copy of all.

    Every process has to call this. torchrun numbers processes machine by machine, so with as many
    as a machine has, only sums of slices go from machine to machine.
    """
    num_ranks = dist.get_world_size()
    if size == num_ranks:
        return Shard(dist.get_rank(), num_ranks)
    mesh = init_device_mesh(device_type, (num_ranks // size, size), mesh_dim_names=("copy", "part"))
    return Shard(mesh.get_local_rank("part"), size, mesh.get_group("part"), mesh.get_group("copy"))


def total_of(values: Tensor, sharding: Shard | None) -> Tensor:
    """Return the sum of what each process found on its slice, such as inner products."""
    if sharding is None:
        return values
    total = values.clone()
    dist.all_reduce(total, group=sharding.group)
    return total
