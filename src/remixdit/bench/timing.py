"""Variants take turns in one run, so that a machine that slows down slows all of them.

What is quoted are medians and their ratios.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch

__all__ = ["Step", "Timing", "Turn", "Under", "take_turns", "turns"]

Step = Callable[[int], None]

SELDOM = 3  # a variant that need not be timed as often runs in every third round


class Under(NamedTuple):
    """What is under way, and how far the benchmark is."""

    name: str
    done: int
    """Parts that are done, in [0, total)."""
    total: int
    """Parts in all: measurements of memory, and steps."""


class Turn(NamedTuple):
    """One step of one variant."""

    number: int
    """Number of the round, from 0."""
    name: str
    is_timed: bool
    """False while the variants warm up."""


class Timing(NamedTuple):
    """How long the steps of one variant took."""

    name: str
    seconds: tuple[float, ...]
    """Seconds of each step."""

    @property
    def median(self) -> float:
        """Median seconds of a step."""
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


def turns(
    names: Collection[str], steps: int, warmup: int = 3, seldom: Collection[str] = ()
) -> list[Turn]:
    """Return who runs when.

    Args:
        names: Of the variants.
        steps: Timed steps of each.
        warmup: Steps of each that come before.
        seldom: Variants that warm up once, and are timed in every third round only.
    """
    order = []
    for number in range(warmup + steps):
        timed = number - warmup
        skipped = 0 < number < warmup if timed < 0 else timed % SELDOM > 0
        order += [
            Turn(number, name, timed >= 0) for name in names if not skipped or name not in seldom
        ]
    return order


def take_turns(
    variants: Mapping[str, Step], order: list[Turn], device: torch.device
) -> Iterator[Timing | Under]:
    """Run the variants in the given order; yields what is under way, then the timings."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for done, (number, name, is_timed) in enumerate(order):
        yield Under(name, done, len(order))
        started = time.perf_counter()
        variants[name](number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if is_timed:
            seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        yield Timing(name, tuple(values))
