"""How long trajectories take: plain, ours mixed and pre-computed, naive."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from remixdit import distributed
from remixdit.bench.peak import peak_bytes
from remixdit.bench.steps import BenchConfig, sampling_variants
from remixdit.bench.timing import Timing, Under, take_turns
from remixdit.diffusion.costs import forward_flops
from remixdit.machine import machine, matrix_flops_per_second
from remixdit.training.config import PRECISIONS

__all__ = ["bench_sampling"]


def bench_sampling(config: BenchConfig) -> Iterator[dict[str, Any] | Under]:
    """Time whole trajectories of the plain DiT and of N experts, mixed and pre-computed."""
    device = distributed.pick_device(config.device)
    peaks: dict[str, int | None] = {}
    for name in sampling_variants(config) if config.memory else ():
        yield Under(f"{name}, memory", 0)
        peaks[name] = peak_bytes(config, "sample", name)
    variants = {name: build(device) for name, build in sampling_variants(config).items()}
    timings: dict[str, Timing] = {}
    for progress in take_turns(variants, config.steps, device, warmup=1):
        if isinstance(progress, Under):
            yield progress
        else:
            timings[progress.name] = progress
    plain = timings["plain"].median
    flops = config.batch_size * config.num_inference_steps * forward_flops(config.shape())
    peak = matrix_flops_per_second(device, PRECISIONS[config.precision])
    result: dict[str, Any] = {
        "config": asdict(config),
        "machine": machine(device),
        "variants": {
            name: {**timing.to_json(), "peak_bytes": peaks.get(name)}
            for name, timing in timings.items()
        },
        "remix_over_plain": timings["mixed"].median / plain,
        "precomputed_over_plain": timings["precomputed"].median / plain,
        "flops_per_trajectory": flops,
        "share_of_peak": {name: flops / t.median / peak for name, t in timings.items()},
        "peak_flops_per_second": peak,
    }
    if "naive" in timings:
        result["naive_over_remix"] = timings["naive"].median / timings["mixed"].median
        result["naive_over_precomputed"] = timings["naive"].median / timings["precomputed"].median
    yield result
