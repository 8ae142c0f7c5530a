"""How a process keeps its memory: a CPU's training step takes the same blocks again and again.

glibc gives large blocks back to the system as they are freed, and has to touch each page anew in
the next step. Kept, and in pages of 2 MB, they save up to a tenth of a step (docs/performance.md).
"""

import ctypes
import os

__all__ = ["keep_memory"]

LARGEST = 2**31 - 1  # that mallopt takes
# Parameters of mallopt, by the variable that sets them in a process that starts.
OPTIONS = {"MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_TRIM_THRESHOLD_": -1}
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # of torch, which reads it when it first takes memory


def keep_memory() -> None:
    """Keep freed memory in this process and those that it starts, as far as nobody chose otherwise.

    It must be called before torch makes a tensor. Where libc is not glibc, only torch's part
    remains.
    """
    os.environ.setdefault(HUGE_PAGES, "1")
    if any(name in os.environ for name in OPTIONS):
        return
    os.environ.update(dict.fromkeys(OPTIONS, str(LARGEST)))  # for the processes that it starts
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl; Windows
        return
    for option in OPTIONS.values():
        mallopt(option, LARGEST)
