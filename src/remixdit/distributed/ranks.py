"""The processes of a run: one, or as many as torchrun started.

Without a process group, on a single process, every function returns at once.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _set_pg_timeout, _world
from torch.distributed.rendezvous import rendezvous

from remixdit.distributed.lost import lost_process

__all__ = [
    "Ranks",
    "Wishes",
    "agree",
    "all_reduce",
    "barrier",
    "by_shares",
    "num_ranks",
    "pick_device",
    "start",
    "stop",
]

# Time-outs of a process that waits for others: encoding and a first compilation may take long,
# joining and steps do not. REMIXDIT_STEP_SECONDS sets another time-out of these two.
FIRST_TIMEOUT = timedelta(hours=24)
STEP_SECONDS = 600
SMALL_BYTES = 2**20  # tensors up to this size are reduced together
PATIENCE_SECONDS = 3  # wait of a process that fails, before it leaves the group


@dataclass(frozen=True)
class Ranks:
    """Rank of this process, and the number of processes."""

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
    """Join the process group that torchrun describes in the environment, if there is one.

    Raises:
        ConnectionError: Another process has not joined in time.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    if not dist.is_initialized():
        try:
            join(device)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ConnectionError(f"the processes have not met: {reason}") from error
        _set_pg_timeout(FIRST_TIMEOUT, None)
    return Ranks(dist.get_rank(), dist.get_world_size())


def join(device: torch.device) -> None:
    """Meet the other processes.

    After `--max-restarts` the store of torchrun still has the addresses of processes that have
    ended (github.com/pytorch/pytorch/issues/135712), so the names there begin with the number of
    restarts. Each of several torchruns counts its own, so they have to share no store instead.
    """
    on_gpu = device.type == "cuda"
    store, rank, size = next(rendezvous("env://", timeout=step_timeout()))
    is_alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if is_alone else "0"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=PrefixStore(f"remixdit/{restarts}", store),
        rank=rank,
        world_size=size,
        timeout=step_timeout(),
        device_id=device if on_gpu else None,
    )


def stop() -> None:
    """Leave the process group, if there is one.

    A wrong request is wrong for every process, and the first reports it. It may still be joining
    and must not find that another has left, so the others wait for it.

    Raises:
        ConnectionError: This process fails because another has ended or hangs.
    """
    if not dist.is_initialized():
        return
    error = sys.exc_info()[1]
    lost = lost_process(error)
    if dist.get_rank() and error is not None and not lost:
        time.sleep(PATIENCE_SECONDS)
    dist.destroy_process_group()
    if lost:
        raise ConnectionError(lost) from error


def all_reduce(tensors: Iterable[Tensor]) -> int:
    """Replace each tensor by its sum over all processes.

    Returns:
        Number of bytes that this process handed over.
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


def by_shares(work: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Return what `work` makes of each row; every process does its share, and gets all.

    Args:
        work: (m, *) => (m, *) of the same type, each row alone.
        rows: (n, *), the same in every process.
    """
    if not dist.is_initialized():
        return work(rows)
    count, num_ranks = len(rows), dist.get_world_size()
    size = -(-count // num_ranks)
    filled = torch.cat([rows, rows.new_zeros(size * num_ranks - count, *rows.shape[1:])])
    own = work(filled.view(num_ranks, size, *rows.shape[1:])[dist.get_rank()]).contiguous()
    dist.all_gather_into_tensor(filled.view(torch.uint8), own.view(torch.uint8))  # gloo: few types
    return filled[:count]


def num_ranks() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def agree(facts: Mapping[str, object]) -> None:
    """Check that all processes are about to do the same.

    Args:
        facts: Values that must be equal, by their name in an error.

    Raises:
        ValueError: Some process differs from the first; the error names the first such fact.
    """
    if not dist.is_initialized():
        return
    digests = [hashlib.sha256(str(value).encode()).digest()[:8] for value in facts.values()]
    own = torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests])
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    every = [torch.empty_like(own, device=device) for _ in range(num_ranks())]
    dist.all_gather(every, own.to(device))
    for name, values in zip(facts, torch.stack(every).t().tolist(), strict=True):
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        if others:
            raise ValueError(
                f"{name} must be the same for all processes, got another on process {others[0]} "
                "than on process 0: do all see the same files?"
            )


class Wishes:
    """What some process wishes, known to all of them one step later.

    Every step begins a sum over all processes, on the CPU and in the background, and reads that of
    the step before, which has arrived meanwhile: nothing waits for a GPU or for the network. So all
    processes read the same after the same step.
    """

    def __init__(self) -> None:
        self.group = None
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=step_timeout())
        self.pending: tuple[Tensor, dist.Work] | None = None

    def exchange(self, *own: bool) -> list[bool]:
        """Tell the others, after a step, what this process wishes; return what any wished."""
        if self.group is None:
            return list(own)
        before = self.read()
        wishes = torch.tensor(own, dtype=torch.int32)
        work = dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self.group, async_op=True)
        self.pending = wishes, work
        return before or [False for _ in own]

    def read(self) -> list[bool]:
        """Return what was wished in the step before; all processes call this when they end."""
        if self.pending is None:
            return []
        (wishes, work), self.pending = self.pending, None
        work.wait()
        return wishes.bool().tolist()

    def lose_patience(self) -> None:
        """Wait only minutes for other processes from now on; one that hangs then ends all."""
        for group in _world.pg_map:  # those of FSDP2's meshes too
            _set_pg_timeout(step_timeout(), group)


def step_timeout() -> timedelta:
    """Return how long a process waits in a step for another."""
    return timedelta(seconds=float(os.environ.get("REMIXDIT_STEP_SECONDS", STEP_SECONDS)))


def barrier() -> None:
    """Wait until every process has called this."""
    if dist.is_initialized():
        dist.barrier()
