"""Wrap a network by DDP or FSDP2, and get whole tensors out of it again.

FSDP2 shards the K bases along their outputs, never along K: every process mixes its part of every
expert.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

__all__ = ["checksum_of", "fill", "local", "replicate", "shard", "sharded_like", "whole"]


def replicate(network: nn.Module, device: torch.device) -> nn.Module:
    """Let every process hold the whole network; gradients are averaged."""
    ids = [device] if device.type == "cuda" else None
    # Gradients are views of the buckets that are sent: no copy of them.
    return DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)


def shard(
    network: nn.Module, parts: list[nn.Module], bases: list[nn.Parameter], size: int = 0
) -> None:
    """Shard parameters, gradients and optimizer state over the processes (FSDP2).

    Args:
        network: Network whose parameters become slices.
        parts: Modules of the network that are gathered one after the other.
        bases: Parameters of the network that are (K, *).
        size: Number of processes that share one copy; gradients are summed between the copies
            (HSDP). 0 for all processes.
    """
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mesh = mesh_of(kind, size or dist.get_world_size())
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    place = placement(mesh, {id(parameter) for parameter in bases})
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy, shard_placement_fn=place)
    fully_shard(network, mesh=mesh, mp_policy=policy, shard_placement_fn=place)


def mesh_of(kind: str, size: int) -> DeviceMesh:
    """Return a mesh of the processes, in groups of `size` that share one copy.

    torchrun numbers processes machine by machine, so with groups of one machine's processes only
    sums of gradient slices go from machine to machine.
    """
    num_ranks = dist.get_world_size()
    if size == num_ranks:
        return init_device_mesh(kind, (num_ranks,))
    return init_device_mesh(kind, (num_ranks // size, size), mesh_dim_names=("copy", "part"))


def placement(mesh: DeviceMesh, bases: set[int]) -> Callable[[nn.Parameter], Shard]:
    """Return the cut of a parameter: bases along the first dimension after K that divides."""
    ranks = mesh.size(-1)

    def place(parameter: nn.Parameter) -> Shard:
        if id(parameter) not in bases:
            return Shard(0)
        sizes = parameter.shape
        return Shard(next((d for d in range(1, len(sizes)) if sizes[d] % ranks == 0), 0))

    return place


def local(values: Tensor) -> Tensor:
    """Return this process's part of a tensor, a view."""
    return values.to_local() if isinstance(values, DTensor) else values


def whole(values: Tensor) -> Tensor:
    """Return the whole of a tensor; if it is sharded, all processes must call together."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def sharded_like(values: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of whole values that every process has, sharded as `like`."""
    if not isinstance(like, DTensor):
        return values
    mesh, placements = like.device_mesh, like.placements
    # Every process has the same values, so none need be sent.
    return distribute_tensor(values, mesh, placements, src_data_rank=None).to_local()


@torch.no_grad()
def fill(target: Tensor, values: Tensor) -> None:
    """Write whole values, which every process has, into a tensor that may be sharded."""
    local(target).copy_(sharded_like(values.to(target.device), target))


def checksum_of(values: Tensor) -> int:
    """Return the sum of the elements of a tensor, their bits read as integers."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(values.contiguous().view(sizes[values.itemsize]).sum(dtype=torch.int64))
