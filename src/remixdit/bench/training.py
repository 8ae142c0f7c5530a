"""How long training steps take and what they need: plain, ours and naive for every M.

Shapes: K bases, M experts of a step.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from remixdit import distributed
from remixdit.bench.config import BenchConfig, runs_of, setting
from remixdit.bench.measuring import Measured, measured
from remixdit.bench.scaling import step_cost
from remixdit.bench.timing import Under
from remixdit.diffusion.costs import training_flops
from remixdit.machine import bytes_per_second, machine, matrix_flops_per_second
from remixdit.training.config import PRECISIONS, TrainConfig

__all__ = ["bench_training", "memory_facts"]


def bench_training(config: BenchConfig) -> Iterator[dict[str, Any] | Under]:
    """Time training steps; yields what is under way, and last the result."""
    for progress in measured(config, "train"):
        if isinstance(progress, Under):
            yield progress
        else:
            yield training_result(config, progress)


def training_result(config: BenchConfig, found: Measured) -> dict[str, Any]:
    """Return the figures of all variants and their ratios, as JSON values."""
    device = distributed.pick_device(config.device)
    flops = training_flops(config.shape(), config.batch_size)
    peak = matrix_flops_per_second(device, PRECISIONS[config.precision])
    runs = runs_of(config)
    medians = {name: timing.median for name, timing in found.timings.items()}
    bandwidth = bytes_per_second(device)
    settings = {
        setting(count): ratios(setting(count), medians, extra_bytes(runs, count) / bandwidth)
        for count in config.counts()
    }
    first = settings[setting(config.counts()[0])]
    return {
        "config": asdict(config),
        "machine": machine(device),
        "variants": {
            name: {
                **timing.to_json(),
                "peak_bytes": found.peaks.get(name),
                **(memory_facts(runs[name], found.peaks.get(name)) if name in runs else {}),
            }
            for name, timing in found.timings.items()
        },
        "settings": settings,
        **{name: first[name] for name in ("remix_over_plain", "naive_over_remix") if name in first},
        "flops_per_step": flops,
        "share_of_peak": {name: flops / seconds / peak for name, seconds in medians.items()},
        "peak_flops_per_second": peak,
        "bytes_per_second": bandwidth,
    }


def ratios(name: str, medians: dict[str, float], extra_seconds: float) -> dict[str, float]:
    """Return how one M does beside plain and naive.

    Args:
        name: Of the setting.
        medians: Seconds of each variant.
        extra_seconds: What the bytes that mixing moves take at full bandwidth.
    """
    plain, remix = medians["plain"], medians[f"remix {name}"]
    found = {"remix_over_plain": remix / plain}
    if f"naive {name}" in medians:
        found["naive_over_remix"] = medians[f"naive {name}"] / remix
    return {**found, "bandwidth_bound_over_plain": 1 + extra_seconds / plain}


def extra_bytes(runs: dict[str, TrainConfig], count: int) -> int:
    """Return the bytes that a step of M experts moves beyond a plain one."""
    plain = step_cost(runs["plain"]).moved_bytes
    return step_cost(runs[f"remix {setting(count)}"]).moved_bytes - plain


def memory_facts(run: TrainConfig, peak: int | None) -> dict[str, Any]:
    """Return what a step of a run keeps, moves and sends, in bytes.

    `excess_fraction` is what the measured peak has beyond the computed one.
    """
    cost = step_cost(run)
    # Any number of processes sends the same; two show it.
    reduced = step_cost(replace(run, batch_size=2 * run.batch_size), 2).reduced_bytes
    computed = sum(cost.memory.values())
    return {
        "memory": cost.memory,
        "memory_bytes": computed,
        "excess_fraction": None if peak is None else peak / computed - 1,
        "moved": cost.moved,
        "reduced_bytes": reduced,
    }
