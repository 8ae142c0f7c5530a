"""`remixdit plan --network NETWORK --gpu MEMORY`."""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from remixdit.bench.cards import GB
from remixdit.bench.planning import LEFT_FREE, Plan, PlanConfig, Plans, make_plans
from remixdit.cli.arguments import base_config, parse
from remixdit.cli.next_steps import say_next, torchrun
from remixdit.cli.results import as_json
from remixdit.cli.terminal import show
from remixdit.training.config import TrainConfig

__all__ = ["run"]

PRESETS = {"S/2": "s2", "B/2": "b2", "L/2": "l2", "XL/2": "xl2"}


@dataclass(frozen=True, kw_only=True)
class PlanArguments(PlanConfig):
    """Say which K, micro-batch and sharding fit a GPU, with memory and hours; nothing is run."""

    json: bool = False
    """Print the result as JSON."""


def run(args: Sequence[str]) -> None:
    """Plan, and print the command that trains so."""
    arguments = parse(PlanArguments, args, "plan")
    config = base_config(arguments, PlanConfig)
    plans = make_plans(config)
    if arguments.json:
        show(as_json(facts(plans)))
        return
    show(text(config, plans))
    words = command(config, plans)
    start = torchrun(min(config.gpus, 8), max(1, config.gpus // 8)) if config.gpus > 1 else ""
    say_next("to train this way, from a plain DiT and encoded shards", words, start=start)


def hours(plans: Plans, plan: Plan) -> float:
    """Return the hours that a plan takes for all images."""
    return plans.num_images / plan.images_per_second / 3600


def num_steps(plans: Plans) -> int:
    """Return the number of optimizer steps for all images."""
    return math.ceil(plans.num_images / plans.plans[0].run.batch_size)


# --- for a program


def facts(plans: Plans) -> dict[str, Any]:
    """Return the plans as JSON values."""
    return {
        "computed": True,
        "card": plans.card.name,
        "memory_bytes": plans.card.memory_bytes,
        "budget_bytes": plans.budget_bytes,
        "flops_share": plans.card.rates.flops_share,
        "steps": num_steps(plans),
        "plans": [plan_facts(plans, plan) for plan in plans.plans],
    }


def plan_facts(plans: Plans, plan: Plan) -> dict[str, Any]:
    """Return one plan as JSON values."""
    run = plan.run
    return {
        "num_bases": run.mixture.num_bases,
        "num_experts": run.mixture.num_experts,
        "experts_per_step": run.mixture.num_experts,
        "precision": run.precision,
        "shard": run.shard,
        "shard_size": run.shard_size,
        "recompute": run.recompute,
        "micro_batch_size": at_once(plan),
        "memory": plan.cost.memory,
        "memory_bytes": plan.memory_bytes,
        "fits": plan.fits,
        "images_per_second": plan.images_per_second if plan.fits else None,
        "hours": hours(plans, plan) if plan.fits else None,
    }


# --- for a person


def text(config: PlanConfig, plans: Plans) -> str:
    """Return the recommendation, the table and what it stands on."""
    best, rates = plans.plans[0], plans.card.rates
    gpus = f"{config.gpus} x {config.gpu}" if config.gpus > 1 else config.gpu
    speed = (
        f"{config.images_per_second:g} images/s are as given, other columns in proportion."
        if config.images_per_second
        else f"Speed: {rates.flops_per_second / 1e12:g} TFLOP/s by the data sheet of the "
        f"{plans.card.name}, of which {rates.flops_share:.0%} is assumed; --images-per-second "
        "replaces it."
    )
    return "\n".join(
        [
            f"{config.network} on {gpus}: {named(best)}, {way(best)}, {precision(best.run)}: "
            f"{best.memory_bytes / GB:.3g} of {plans.budget_bytes / GB:.3g} GB, "
            f"{hours(plans, best):,.3g} hours for {num_steps(plans):,} steps of "
            f"{best.run.batch_size} images",
            table(plans),
            "All of this is computed, and no GPU has run it. GB are 10^9 bytes of one GPU; the sum "
            "is an upper",
            f"bound, and a tenth of the memory ({LEFT_FREE:.0%}) is left for CUDA and gaps.",
            speed,
        ]
    )


def named(plan: Plan) -> str:
    """Return K, N and M of a plan."""
    mixture = plan.run.mixture
    if mixture.num_bases == 1:
        return "a plain DiT"
    return f"K = {mixture.num_bases}, N = M = {mixture.num_experts}"


def way(plan: Plan) -> str:
    """Return how a plan saves memory."""
    words = [sharding(plan.run), f"{at_once(plan)} images at once"]
    if plan.run.recompute:
        words.append("recomputing")
    return ", ".join(filter(None, words))


def sharding(run: TrainConfig) -> str:
    """Return over which processes the state is sharded."""
    return f"sharded over {run.shard_size or 'all'}" if run.shard else ""


def precision(run: TrainConfig) -> str:
    """Return the precision of a run in words."""
    return {"bf16": "bfloat16", "fp32": "float32"}[run.precision]


def at_once(plan: Plan) -> int:
    """Return the number of images that a process runs in one forward pass."""
    return plan.run.micro_batch_size or plan.cost.images


def table(plans: Plans) -> str:
    """Return the plans side by side, the recommended one first."""
    drawn = Table(box=box.SIMPLE, pad_edge=False)
    drawn.add_column("")
    for plan in plans.plans:
        k = plan.run.mixture.num_bases
        drawn.add_column("plain" if k == 1 else f"K = {k}", justify="right")
    for name, cells in rows(plans):
        drawn.add_row(name, *cells)
    printed = io.StringIO()
    Console(file=printed, width=100, color_system=None).print(drawn)
    return "\n".join(line.rstrip() for line in printed.getvalue().strip("\n").split("\n"))


def rows(plans: Plans) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each row, and its cells."""
    found = plans.plans
    yield "experts N = M", [str(plan.run.mixture.num_experts) for plan in found]
    yield "images at once", [str(at_once(plan)) for plan in found]
    yield "--recompute", ["yes" if plan.run.recompute else "no" for plan in found]
    yield "--shard", [shard_cell(plan.run) for plan in found]
    for part in found[0].cost.memory:
        if any(plan.cost.memory[part] for plan in found):
            yield f"{part}, GB", [cell(plan.cost.memory[part] / GB) for plan in found]
    yield "sum, GB", [cell(plan.memory_bytes / GB) for plan in found]
    yield "fits", ["yes" if plan.fits else "no" for plan in found]
    yield "images/s", [cell(plan.images_per_second) if plan.fits else "" for plan in found]
    yield "hours", [cell(hours(plans, plan)) if plan.fits else "" for plan in found]


def shard_cell(run: TrainConfig) -> str:
    """Return whether a run is sharded, and over how many processes if not all."""
    return str(run.shard_size or "yes") if run.shard else "no"


def cell(value: float) -> str:
    """Return a number with three digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def command(config: PlanConfig, plans: Plans) -> list[str]:
    """Return the training of the recommended plan; its data and start have the manual's names."""
    run = plans.plans[0].run
    is_model = Path(config.network).is_dir()
    name = config.network.upper().removeprefix("DIT-")
    preset = PRESETS.get(name, "s2") if run.mixture.num_bases > 1 else "continued"
    words = ["train", preset, "--data", "shards"]
    words += ["--from", config.network if is_model else "plain", "--output-dir", "run"]
    if run.mixture.num_bases > 1:
        words += ["--num-bases", str(run.mixture.num_bases)]
        words += ["--num-experts", str(run.mixture.num_experts)]
    words += ["--batch-size", str(run.batch_size), "--steps", str(num_steps(plans))]
    for flag in ("micro_batch_size", "shard_size"):
        if value := getattr(run, flag):
            words += [f"--{flag.replace('_', '-')}", str(value)]
    if run.optimizer.algorithm != "adamw":
        words += ["--algorithm", run.optimizer.algorithm]
    return words + [f"--{flag}" for flag in ("shard", "recompute") if getattr(run, flag)]
