"""What would a step cost on up to 1,024 GPUs? Everything is computed, nothing is run.

    python benchmarks/scaling.py                # the tables of docs/scaling.md
    python benchmarks/scaling.py --json         # every combination, a line of JSON each

The GPU is an H100 by its data sheet; a network is assumed to reach the share --flops-share of its
peak. Each GPU has --images images, however many GPUs there are.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

from remixdit.bench.scaling import H100, Hardware, StepCost, step_cost, step_seconds
from remixdit.diffusion.dit import DiTConfig
from remixdit.training.config import MixtureConfig, TrainConfig

NETWORKS = ("S/2", "B/2", "L/2", "XL/2")
BASES = (1, 2, 4, 8, 16)
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# name: fields of the run
WAYS = {
    "DDP": {},
    "--shard": {"shard": True},
    "--shard-size 8": {"shard": True, "shard_size": 8},
}
PARTS = ("parameters", "moments", "average", "gradients", "mixed", "autocast", "activations")


@cache
def cost_of(
    network: str, num_bases: int, experts: int, gpus: int, way: str, images: int
) -> StepCost:
    """Return the cost of a step; K = 1 is the plain network."""
    num_experts = 20 if num_bases > 1 else 1
    config = TrainConfig(
        data="",
        output_dir=Path(),
        network=DiTConfig.named(network),
        mixture=MixtureConfig(
            num_bases=num_bases,
            num_experts=num_experts,
            experts_per_step=min(experts, num_experts),
        ),
        batch_size=images * gpus,
        precision="bf16",
        **WAYS[way],
    )
    return step_cost(config, gpus)


def table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    print()


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g}" if count < 1e12 else f"{count / 1e9:.0f}"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}"


def bases_table(images: int, hardware: Hardware) -> None:
    """What K costs: 8 GPUs, all N = 20 experts in every step."""
    rows = []
    for network, num_bases in product(NETWORKS, BASES):
        cost = cost_of(network, num_bases, 20, 8, "DDP", images)
        sharded = cost_of(network, num_bases, 20, 8, "--shard", images)
        plain = step_seconds(cost_of(network, 1, 1, 8, "DDP", images), hardware)["step"]
        seconds = step_seconds(cost, hardware)["step"]
        sharded_seconds = step_seconds(sharded, hardware)["step"]
        rows.append(
            (
                *(network, num_bases, *(gigabytes(cost.memory[part]) for part in PARTS)),
                gigabytes(sum(cost.memory.values())),
                *(gigabytes(sum(sharded.memory.values())), gigabytes(cost.moved_bytes)),
                *(gigabytes(cost.reduced_bytes), f"{1 / seconds:.3g}"),
                *(f"{seconds / plain:.3f}", f"{sharded_seconds / plain:.3f}"),
            )
        )
    times = ("steps/s", "over plain", "over plain, `--shard`")
    table(("network", "K", *PARTS, "sum", "sum, `--shard`", "moved", "reduced", *times), rows)


def experts_table(images: int, hardware: Hardware) -> None:
    """What M experts a step cost: 8 GPUs, K = 4."""
    rows = []
    for network, experts, way in product(NETWORKS, (1, 4, 20), ("DDP", "--shard")):
        cost = cost_of(network, 4, experts, 8, way, images)
        seconds = step_seconds(cost, hardware)
        one = step_seconds(cost_of(network, 4, 1, 8, way, images), hardware)["step"]
        mixing = (cost.moved["mixing"] + cost.moved["folding"]) / hardware.memory_bandwidth
        rows.append(
            (
                *(network, experts, way, gigabytes(sum(cost.memory.values()))),
                *(gigabytes(cost.moved_bytes), gigabytes(cost.reduced_bytes)),
                *(gigabytes(cost.gathered_bytes), milliseconds(seconds["network"])),
                *(milliseconds(mixing), milliseconds(seconds["passes"] - mixing)),
                *(milliseconds(seconds["communication"]), f"{1 / seconds['step']:.3g}"),
                f"{seconds['step'] / one:.2f}",
            )
        )
    bytes_of = ("memory", "moved", "reduced", "gathered")
    times = ("network, ms", "mixing, ms", "other passes, ms", "sending, ms", "steps/s")
    table(("network", "M", "parallelism", *bytes_of, *times, "over M = 1"), rows)


def gpus_table(images: int, hardware: Hardware) -> None:
    """What many GPUs do: K = 4, one expert a step (the published method)."""
    rows = []
    for network, gpus in product(NETWORKS, (1, 2, 8, 16, 64, 256, 1024)):
        ways = {
            way: cost_of(network, 4, 1, gpus, way, images)
            for way in WAYS
            if (way == "DDP" or gpus > 1) and (way != "--shard-size 8" or gpus % 8 == 0)
        }
        cells: list[str] = []
        for way in WAYS:
            if way not in ways:
                cells += ["", "", ""]
                continue
            seconds = step_seconds(ways[way], hardware)
            cells += [
                gigabytes(sum(ways[way].memory.values())),
                f"{1 / seconds['step']:.3g}",
                f"{seconds['communication'] / seconds['step']:.0%}",
            ]
        rows.append((network, f"{gpus:,}", f"{images * gpus:,}", *cells))
    columns = (f"{way}: {what}" for way in WAYS for what in ("GB", "steps/s", "sending"))
    table(("network", "GPUs", "batch", *columns), rows)


def combinations(images: int, hardware: Hardware) -> Iterator[dict[str, object]]:
    """Yield every combination."""
    for network, num_bases, gpus, way in product(NETWORKS, BASES, GPUS, WAYS):
        if (way == "--shard" and gpus == 1) or (way == "--shard-size 8" and gpus % 8):
            continue
        for experts in (1,) if num_bases == 1 else (1, 4, 20):
            cost = cost_of(network, num_bases, experts, gpus, way, images)
            setting = {"network": network, "num_bases": num_bases, "experts_per_step": experts}
            seconds = step_seconds(cost, hardware)
            yield {**setting, "way": way, **cost.to_json(), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--flops-share", type=float, default=H100.flops_share)
    options = parser.parse_args()
    hardware = replace(H100, flops_share=options.flops_share)
    if options.json:
        for row in combinations(options.images, hardware):
            print(json.dumps(row))
        return
    for make in (bases_table, experts_table, gpus_table):
        print(f"{make.__doc__}\n")
        make(options.images, hardware)


if __name__ == "__main__":
    main()
