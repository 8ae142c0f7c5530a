"""What a machine can do at most, measured, and how much of its memory this process holds."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "bytes_per_second",
    "can_reset_peak",
    "machine",
    "matrix_flops_per_second",
    "peak_resident_bytes",
    "reset_peak_resident",
    "resident_bytes",
]

PROCESS = Path("/proc/self")  # Linux


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


def resident_bytes() -> int:
    """Return the bytes of memory that this process holds now."""
    return status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Return the most bytes that this process has held since `reset_peak_resident`."""
    return status_bytes("VmHWM")


def reset_peak_resident() -> None:
    """Let the peak begin at what the process holds now."""
    (PROCESS / "clear_refs").write_text("5")


def can_reset_peak() -> bool:
    """Whether the system tells a process its peak, and lets it begin anew."""
    return os.access(PROCESS / "clear_refs", os.W_OK)


def status_bytes(name: str) -> int:
    """Return a number of kilobytes that the system states of this process, in bytes."""
    lines = (PROCESS / "status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
