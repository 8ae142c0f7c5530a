"""How a process keeps its memory: a CPU's training step takes the same blocks again and again.

glibc gives large blocks back to the system as they are freed, and has to touch each page anew in
the next step. Kept, and in pages of 2 MB, they save up to a tenth of a step (docs/performance.md).
"""

import ctypes
import os
from pathlib import Path

__all__ = ["keep_memory"]

# Variables that glibc reads when a process starts, and what mallopt calls them.
BLOCKS, TRIM = ("MALLOC_MMAP_THRESHOLD_", -3), ("MALLOC_TRIM_THRESHOLD_", -1)
LARGEST = 2**31 - 1  # that mallopt takes
LARGEST_BLOCKS = (LARGEST, 2**25)  # the second: before glibc 2.35
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # of torch, which reads it when it first takes memory
CHOICES = (BLOCKS[0], TRIM[0], "GLIBC_TUNABLES", HUGE_PAGES)
GPU = Path("/dev/nvidiactl")


def keep_memory() -> None:
    """Keep freed memory in this process and those that it starts.

    Not where somebody chose otherwise, where libc is not glibc, or with a GPU, beside which a
    process takes large blocks once. It must be called before torch makes a tensor.
    """
    if any(name in os.environ for name in CHOICES) or GPU.exists():
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl; Windows
        return
    largest = next((size for size in LARGEST_BLOCKS if mallopt(BLOCKS[1], size)), None)
    if largest is None or not mallopt(TRIM[1], LARGEST):
        return
    os.environ.update({BLOCKS[0]: str(largest), TRIM[0]: str(LARGEST), HUGE_PAGES: "1"})
