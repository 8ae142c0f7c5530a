"""How long trajectories take: plain, ours mixed at boundaries and pre-computed, naive."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from remixdit import distributed
from remixdit.bench.config import BenchConfig
from remixdit.bench.measuring import Measured, measured
from remixdit.bench.timing import Under
from remixdit.diffusion.costs import forward_flops
from remixdit.machine import machine, matrix_flops_per_second
from remixdit.training.config import PRECISIONS

__all__ = ["bench_sampling"]


def bench_sampling(config: BenchConfig) -> Iterator[dict[str, Any] | Under]:
    """Time whole trajectories; yields what is under way, and last the result."""
    for progress in measured(config, "sample", warmup=1):
        if isinstance(progress, Under):
            yield progress
        else:
            yield sampling_result(config, progress)


def sampling_result(config: BenchConfig, found: Measured) -> dict[str, Any]:
    """Return the figures of all variants and their ratios, as JSON values."""
    device = distributed.pick_device(config.device)
    medians = {name: timing.median for name, timing in found.timings.items()}
    flops = config.batch_size * config.num_inference_steps * forward_flops(config.shape())
    peak = matrix_flops_per_second(device, PRECISIONS[config.precision])
    settings: dict[str, dict[str, float]] = {}
    for name in ("mixed", "precomputed"):
        settings[name] = {"remix_over_plain": medians[name] / medians["plain"]}
        if "naive" in medians:
            settings[name]["naive_over_remix"] = medians["naive"] / medians[name]
    return {
        "config": asdict(config),
        "machine": machine(device),
        "variants": {
            name: {**timing.to_json(), "peak_bytes": found.peaks.get(name)}
            for name, timing in found.timings.items()
        },
        "settings": settings,
        **settings["mixed"],
        "flops_per_trajectory": flops,
        "share_of_peak": {name: flops / seconds / peak for name, seconds in medians.items()},
        "peak_flops_per_second": peak,
    }
