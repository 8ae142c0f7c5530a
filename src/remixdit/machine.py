"""What a machine can do at most: memory bandwidth and matrix products, measured."""

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["bytes_per_second", "machine", "matrix_flops_per_second"]


def bytes_per_second(device: torch.device) -> float:
    """Measure the bandwidth of memory: bytes read and written by scaling a large array in place.

    That is how an update goes through memory. A copy is slower on a CPU, which reads what it is
    about to overwrite.
    """
    size = 2**30 if device.type == "cuda" else 2**28
    values = torch.ones(size // 4, device=device)
    best = min(timed(lambda: values.mul_(1.0), device) for _ in range(10))
    return 2 * size / best


def matrix_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the peak of a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    left = torch.randn(size, size, device=device).to(dtype)
    best = min(timed(lambda: left @ left, device) for _ in range(5))
    return 2 * size**3 / best


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures were measured on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
