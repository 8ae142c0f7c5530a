"""Variants take turns in one run, so that a machine that slows down slows all of them.

What is quoted are medians and their ratios.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch

__all__ = ["Step", "Timing", "Under", "take_turns"]

Step = Callable[[int], None]


class Under(NamedTuple):
    """What is under way."""

    name: str
    done: int
    """Rounds that were timed."""


class Timing(NamedTuple):
    """How one variant did."""

    name: str
    seconds: tuple[float, ...]
    """Of each step."""

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; times in milliseconds."""
        times = sorted(1000 * value for value in self.seconds)
        quarter = len(times) // 4
        return {
            "median_ms": median(times),
            "quartiles_ms": [times[quarter], times[-1 - quarter]],
            "steps": len(times),
        }


def take_turns(
    variants: Mapping[str, Step], steps: int, device: torch.device, warmup: int = 3
) -> Iterator[Timing | Under]:
    """Run the variants in turn, step by step; yields what is under way, then the timings."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(warmup + steps):
        for name, step in variants.items():
            yield Under(name, max(0, index - warmup))
            started = time.perf_counter()
            step(index)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        yield Timing(name, tuple(values))
