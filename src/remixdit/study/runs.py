"""The runs of a study's cell: what is trained, from what, and for how many steps.

A cell may have two runs after each other: that of the variant that goes first, such as a plain DiT,
and its own. Of a study of equal time a cell's own run has two goals, which it reaches one after the
other: as many images as all variants see, and as many seconds.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from remixdit.model.model import RemixDiT
from remixdit.study.config import StudyConfig
from remixdit.study.variants import Variant, independent_runs, run_config, variant
from remixdit.training.config import MixtureConfig, ObjectiveConfig, OutputConfig, TrainConfig
from remixdit.training.optimizer import OptimizerConfig

__all__ = [
    "REFERENCE",
    "START_DIR",
    "Cell",
    "cell_dir",
    "common_run",
    "first_parts",
    "goals_of",
    "parts_of",
    "result_path",
    "speed_name",
    "starts_of",
    "steps_before",
]

START_DIR = "start"  # copy of the model that all cells start from
REFERENCE = "stratified"  # variant whose seconds are everybody's budget


class Cell(NamedTuple):
    """One run of a study, of one variant and one seed."""

    variant: str
    seed: int


def cell_dir(config: StudyConfig, cell: Cell) -> Path:
    """Return the directory of a cell."""
    return config.output_dir / "cells" / cell.variant / f"seed-{cell.seed}"


def result_path(config: StudyConfig, cell: Cell) -> Path:
    """Return the file whose existence marks a finished cell."""
    return cell_dir(config, cell) / "result.json"


def speed_name(name: str) -> str:
    """Return the variant whose steps take as long: learning rates cost nothing."""
    return name.partition("@")[0]


def goals_of(config: StudyConfig, name: str, ratios: dict[str, float]) -> dict[str, int]:
    """Return the steps of a cell's own run by goal: "images", and in a study of time "seconds".

    Args:
        config: The study, whose steps are those of the plain DiT.
        name: Name of the variant.
        ratios: Seconds of a step of each variant over those of a step of the reference.
    """
    chosen = variant(name)
    before = steps_before(config, chosen, ratios)
    goals = {"images": max(1, round(config.steps * chosen.share)) - before}
    if config.is_timed:
        left = config.steps - before * ratios[speed_name(chosen.first)] if before else config.steps
        goals["seconds"] = round(left / ratios[speed_name(name)])
    if min(goals.values()) < 1:
        raise ValueError(
            f"steps must leave at least 1 after the first variant of {name}, got {config.steps}"
        )
    return goals


def steps_before(config: StudyConfig, chosen: Variant, ratios: dict[str, float]) -> int:
    """Return the steps of the variant that goes first, 0 without one.

    Its share is one of the seconds in a study of time, and else one of the images.

    Args:
        config: The study.
        chosen: Variant that comes after it.
        ratios: Seconds of a step of each variant over those of the reference; none for images.
    """
    if not chosen.first:
        return 0
    ratio = ratios[speed_name(chosen.first)] if config.is_timed else 1
    return max(1, min(round(config.steps * chosen.first_share / ratio), config.steps - 1))


def first_parts(
    config: StudyConfig, cell: Cell, start: RemixDiT, ratios: dict[str, float]
) -> tuple[TrainConfig, ...]:
    """Return the runs of the variant that goes first; none without one."""
    chosen = variant(cell.variant)
    if not chosen.first:
        return ()
    first = replace(variant(chosen.first), learning_rate_factor=chosen.learning_rate_factor)
    common = common_run(config, cell, start)
    steps, place = steps_before(config, chosen, ratios), cell_dir(config, cell) / "first"
    run = replace(run_config(first, common), steps=steps, output_dir=place)
    return independent_runs(first, run)


def starts_of(config: StudyConfig, first: tuple[TrainConfig, ...]) -> tuple[str, ...]:
    """Return the models from which a cell's own run starts."""
    return tuple(str(part.output_dir) for part in first) or (str(config.output_dir / START_DIR),)


def parts_of(
    config: StudyConfig, cell: Cell, start: RemixDiT, goal: str, ratios: dict[str, float]
) -> tuple[TrainConfig, ...]:
    """Return the runs in which a cell reaches a goal: one, or one for each independent expert.

    Args:
        config: The study.
        cell: The cell.
        start: Model that the study starts from.
        goal: "images" or "seconds".
        ratios: Seconds of a step of each variant over those of the reference.
    """
    chosen = variant(cell.variant)
    run = run_config(chosen, common_run(config, cell, start))
    origin, *further = starts_of(config, first_parts(config, cell, start, ratios))
    goals = goals_of(config, cell.variant, ratios)
    run = replace(run, steps=goals[goal], init_from=origin, further_bases=tuple(further))
    mixture = run.mixture
    if mixture.prior_strength and mixture.prior_schedule == "linear" and goal == "seconds":
        # A schedule that ends with the run: another goal is another run.
        run = replace(run, output_dir=run.output_dir.with_name("run-seconds"))
    # The checkpoint after half of the images is written on the way to either goal.
    half = max(1, independent_runs(chosen, replace(run, steps=goals["images"]))[0].steps // 2)
    return tuple(
        replace(part, output=replace(part.output, save_every=half))
        for part in independent_runs(chosen, run)
    )


def common_run(config: StudyConfig, cell: Cell, start: RemixDiT) -> TrainConfig:
    """Return the run of a cell, without the changes of its variant."""
    steps = max(1, round(config.steps * variant(cell.variant).share))
    return TrainConfig(
        data=config.data,
        output_dir=cell_dir(config, cell) / "run",
        init_from=str(config.output_dir / START_DIR),
        steps=steps,
        batch_size=config.batch_size,
        seed=cell.seed + 1,  # another seed than the start's, whose batches it would repeat
        device=config.device,
        precision=config.precision,
        network=start.config.network,
        mixture=MixtureConfig(num_bases=config.num_bases, num_experts=config.num_experts),
        objective=ObjectiveConfig(
            prediction_type=start.config.prediction_type, mirror=config.mirror
        ),
        optimizer=OptimizerConfig(
            algorithm=config.algorithm,
            learning_rate=config.learning_rate,
            lr_schedule=config.lr_schedule,
            betas=(0.9, config.beta2),
            warmup_steps=min(100, steps // 10),
            ema_decay=config.ema_decay,
        ),
        output=OutputConfig(
            log_every=max(1, min(50, steps // 2)),
            save_every=max(1, steps // 2),
            save_minutes=0,  # the checkpoint of half of the steps must not be pruned
            keep_checkpoints=4,
            tensorboard=False,
        ),
    )
