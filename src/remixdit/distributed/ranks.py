"""The processes of a run: one, or as many as torchrun started.

Every function works on a single process without a process group, and then does nothing.
"""

import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from remixdit.distributed import heartbeat

__all__ = ["Ranks", "all_reduce", "barrier", "pick_device", "start", "stop"]

# A first compilation or encoding may take long; who is gone is found by its heartbeat.
COLLECTIVE_TIMEOUT = timedelta(hours=24)
SMALL_BYTES = 2**20  # tensors up to this size are reduced together
PATIENCE_SECONDS = 3  # of a process that fails, before it leaves the others


@dataclass(frozen=True)
class Ranks:
    """Which of the processes this one is."""

    rank: int = 0
    num_ranks: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0


def pick_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda"; each process of a machine has its own GPU."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be one that this machine has, got cuda: no GPU was found")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def start(device: torch.device) -> Ranks:
    """Join the process group that torchrun describes in the environment, if there is one."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks == 1:
        return Ranks()
    if not dist.is_initialized():
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if on_gpu else None,
        )
        heartbeat.start(dist.get_rank(), num_ranks)
    return Ranks(dist.get_rank(), num_ranks)


def stop() -> None:
    """Leave the process group, if there is one.

    What is wrong with a request is wrong for every process, and the first says it. It may still be
    joining, and must not find that another has left: the others wait for it.
    """
    if dist.is_initialized() and dist.get_rank() and sys.exc_info()[0] is not None:
        time.sleep(PATIENCE_SECONDS)
    heartbeat.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce(tensors: Iterable[Tensor]) -> int:
    """Replace each tensor by its sum over all processes.

    Returns:
        Bytes that this process handed over.
    """
    if not dist.is_initialized():
        return 0
    small: dict[torch.dtype, list[Tensor]] = {}
    parts: list[Tensor] = []
    for tensor in tensors:
        if tensor.nbytes > SMALL_BYTES:
            parts.append(tensor)
        else:
            small.setdefault(tensor.dtype, []).append(tensor)
    joined = [torch.cat([tensor.flatten() for tensor in group]) for group in small.values()]
    pending = [dist.all_reduce(part, async_op=True) for part in parts + joined]
    for work in pending:
        work.wait()
    for group, flat in zip(small.values(), joined, strict=True):
        sizes = [tensor.numel() for tensor in group]
        for tensor, values in zip(group, torch.split(flat, sizes), strict=True):
            tensor.copy_(values.view_as(tensor))
    return sum(part.nbytes for part in parts + joined)


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()
