"""How long steps of training take and what they need: plain, ours, naive.

Shapes: K bases, M experts of a step.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from remixdit import distributed
from remixdit.bench.peak import peak_bytes
from remixdit.bench.scaling import step_cost
from remixdit.bench.steps import BenchConfig, run_of, training_variants
from remixdit.bench.timing import Timing, Under, take_turns
from remixdit.diffusion.costs import training_flops
from remixdit.machine import bytes_per_second, machine, matrix_flops_per_second
from remixdit.training.config import PRECISIONS, TrainConfig

__all__ = ["bench_training", "memory_facts"]


def bench_training(config: BenchConfig) -> Iterator[dict[str, Any] | Under]:
    """Time training steps; yields what is under way, and last the result."""
    device = distributed.pick_device(config.device)
    peaks: dict[str, int | None] = {}
    for name in training_variants(config) if config.memory else ():
        yield Under(f"{name}, memory", 0)
        peaks[name] = peak_bytes(config, "train", name)
    variants = {name: build(device) for name, build in training_variants(config).items()}
    timings = {}
    for progress in take_turns(variants, config.steps, device):
        if isinstance(progress, Under):
            yield progress
        else:
            timings[progress.name] = progress
    yield training_result(config, device, timings, peaks)


def training_result(
    config: BenchConfig,
    device: torch.device,
    timings: dict[str, Timing],
    peaks: dict[str, int | None],
) -> dict[str, Any]:
    """Return the figures of all variants, their ratios and the floor of memory."""
    flops = training_flops(config.shape(), config.batch_size)
    peak = matrix_flops_per_second(device, PRECISIONS[config.precision])
    plain = timings["plain"].median
    floor = floor_bytes(config) / bytes_per_second(device)
    first = f"remix M={config.experts_per_step[0]}"
    remix = timings[first].median
    runs = run_of(config)
    result: dict[str, Any] = {
        "config": asdict(config),
        "machine": machine(device),
        "variants": {
            name: {
                **timing.to_json(),
                "peak_bytes": peaks.get(name),
                **(memory_facts(runs[name], peaks.get(name)) if name in runs else {}),
            }
            for name, timing in timings.items()
        },
        "remix_over_plain": remix / plain,
        "floor_over_plain": (plain + floor) / plain,
        "floor_extra_ms": 1000 * floor,
        "flops_per_step": flops,
        "share_of_peak": {name: flops / t.median / peak for name, t in timings.items()},
        "peak_flops_per_second": peak,
    }
    if "naive" in timings:
        result["naive_over_remix"] = timings["naive"].median / remix
    for count in config.experts_per_step[1:]:
        name = f"remix M={count}"
        result[f"{name} over {first}"] = timings[name].median / remix
    return result


def memory_facts(run: TrainConfig, peak: int | None) -> dict[str, Any]:
    """Return what a step of a run keeps, needs, moves and sends, in bytes.

    `excess_fraction` is what the measured peak has beyond what the method needs: K bases, two
    moments, an average, a plain network, min(M, K) plain gradients and the activations.
    """
    cost = step_cost(run)
    # As many processes as there may be send the same; two show it.
    reduced = step_cost(replace(run, batch_size=2 * run.batch_size), 2).reduced_bytes
    needed = needed_bytes(run)
    return {
        "memory": cost.memory,
        "needed_bytes": needed,
        "excess_fraction": None if peak is None else peak / needed - 1,
        "moved": cost.moved,
        "reduced_bytes": reduced,
    }


def needed_bytes(run: TrainConfig) -> int:
    """Return the memory that training by this method cannot do without."""
    count = min(run.strata_per_step, run.mixture.num_bases)
    one_by_one = replace(run, compile=True, mixture=replace(run.mixture, experts_per_step=count))
    kept = {**step_cost(one_by_one).memory, "activations": 0}
    return sum(kept.values()) + step_cost(run).memory["activations"]


def floor_bytes(config: BenchConfig) -> float:
    """Return the bytes that mixing must move in addition to a plain step.

    Reading and writing K instead of 1 of bases, both moments and average; reading the K bases
    once more for the inner products and once more for the mix, which writes one network.
    """
    plain, remix = (
        step_cost(replace(run, mixture=replace(run.mixture, experts_per_step=1))).memory
        for run in (run_of(replace(config, experts_per_step=(1,)))).values()
    )
    one = (remix["average"] - plain["average"]) / max(1, config.num_bases - 1)
    width = PRECISIONS[config.precision].itemsize
    return 8 * (config.num_bases - 1) * one + 2 * config.num_bases * one + one * width / 4
