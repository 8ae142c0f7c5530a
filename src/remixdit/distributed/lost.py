"""What is said when another process has ended or hangs.

Torch's errors do not say which process that was. A process that fails therefore says in the store
that it is alive, and looks for those that do not say so.
"""

import threading
import time
from contextlib import suppress

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

__all__ = ["lost_process"]

PATIENCE_SECONDS = 3  # until all that are alive have said so


def lost_process(error: BaseException | None) -> str:
    """Return what an error of torch says of another process, "" if it is of something else."""
    message = str(error) if isinstance(error, RuntimeError) else ""
    # Gloo's words for it; torchrun tells which one, and why.
    if "by peer" in message or "connectFullMesh failed" in message:
        silent_ranks(0)
        return "another process has ended"
    if "imed out" in message and "wait" in message.lower():  # gloo's, and NCCL's
        silent = silent_ranks(PATIENCE_SECONDS)
        who = f"process {', '.join(map(str, silent))}" if silent else "another process"
        return f"{who} no longer answers; the same command resumes from what was saved"
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
        return "the process that the others meet through has ended"
    return ""


def silent_ranks(seconds: float) -> list[int]:
    """Say that this process is alive; return the ranks that have not said so after a while."""
    silent: list[int] = []
    store, rank, others = _get_default_store(), dist.get_rank(), range(dist.get_world_size())

    def ask() -> None:
        with suppress(RuntimeError):  # the store has ended with the process that held it
            store.set(key_of(rank), "")
            time.sleep(seconds)
            silent.extend(other for other in others if not store.check([key_of(other)]))

    # A thread, because a store whose process hangs never answers.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * seconds + 1)
    return silent


def key_of(rank: int) -> str:
    """Return the key under which a process says that it is alive."""
    return f"remixdit/alive/{rank}"
