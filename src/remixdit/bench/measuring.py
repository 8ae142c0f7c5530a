"""Peak memory and times of all variants of a benchmark."""

from collections.abc import Iterator
from typing import NamedTuple

from remixdit import distributed
from remixdit.bench.config import BenchConfig
from remixdit.bench.peak import VARIANTS, peak_bytes
from remixdit.bench.timing import Timing, Under, take_turns, turns

__all__ = ["Measured", "measured"]


class Measured(NamedTuple):
    """What was measured of each variant, by name."""

    timings: dict[str, Timing]
    peaks: dict[str, int]
    """Bytes at the peak; without those that were not measured."""


def measured(config: BenchConfig, what: str, warmup: int = 3) -> Iterator[Measured | Under]:
    """Measure the memory of each variant, then let all take turns.

    Args:
        config: What to measure.
        what: "train" or "sample".
        warmup: Steps of each variant that are not timed.

    Yields:
        What is under way, and last the result.
    """
    device = distributed.pick_device(config.device)
    builders = VARIANTS[what](config)
    naive = [name for name in builders if name.startswith("naive")]
    order = turns(list(builders), config.steps, warmup, naive)
    weighed = list(builders) if config.memory else []
    total = len(weighed) + len(order)
    peaks: dict[str, int] = {}
    for number, name in enumerate(weighed):
        yield Under(f"{name}, memory", number, total)
        peak = peak_bytes(config, what, name)
        if peak is not None:
            peaks[name] = peak
    yield Under("building", len(weighed), total)
    variants = {name: build() for name, build in builders.items()}
    timings: dict[str, Timing] = {}
    for progress in take_turns(variants, order, device):
        if isinstance(progress, Under):
            yield progress._replace(done=progress.done + len(weighed), total=total)
        else:
            timings[progress.name] = progress
    yield Measured(timings, peaks)
