"""The seconds of a training step of every variant of a study, measured by turns in one process.

Budgets in seconds follow from the ratio to the reference, so a machine that slows down while other
work runs changes none of them.

    study/speeds.json    by variant: median and quartiles, and the ratio
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from remixdit.bench.timing import Step, Timing, Turn, take_turns
from remixdit.data import ShardDataset
from remixdit.distributed import Ranks, pick_device
from remixdit.files import write_file
from remixdit.machine import machine
from remixdit.model.loading import load_model
from remixdit.model.model import RemixDiT
from remixdit.study.config import StudyConfig
from remixdit.study.runs import REFERENCE, START_DIR, Cell, common_run, speed_name
from remixdit.study.variants import START, chosen_variants, independent_runs, run_config, variant
from remixdit.training.config import TrainConfig
from remixdit.training.start import outline_of, settled, starting_model
from remixdit.training.trainer import Training

__all__ = ["Speeds", "measure_speeds", "missing_speeds", "ratios_of", "read_speeds"]

NUM_ROUNDS, IN_A_ROW = 10, 4  # the first step of a row finds other weights in the caches
Speeds = dict[str, dict[str, Any]]


def read_speeds(config: StudyConfig) -> Speeds:
    """Return what has been measured, by variant."""
    path = config.output_dir / "speeds.json"
    found: Speeds = json.loads(path.read_text("utf-8"))["steps"] if path.is_file() else {}
    return found


def ratios_of(speeds: Speeds) -> dict[str, float]:
    """Return the seconds of a step over those of the reference, by variant."""
    return {name: speed["over_reference"] for name, speed in speeds.items()}


def missing_speeds(config: StudyConfig) -> list[str]:
    """Return the variants whose steps have not been measured yet."""
    chosen = [name for name in chosen_variants(config.name, config.variants) if name != START]
    names = [*chosen, *(variant(name).first for name in chosen)]
    known = read_speeds(config)
    return [n for n in dict.fromkeys(map(speed_name, filter(None, names))) if n not in known]


def measure_speeds(config: StudyConfig, names: Sequence[str], threads: int) -> None:
    """Time steps of variants by turns with the reference, and write them down."""
    torch.set_num_threads(threads)
    device, start = pick_device(config.device), load_model(config.output_dir / START_DIR)
    # All are compiled in this one process, if at all.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
    steps = {name: step_of(config, name, start) for name in dict.fromkeys([REFERENCE, *names])}
    timings = {
        timing.name: timing
        for timing in take_turns(steps, rows_of_steps(list(steps)), device)
        if isinstance(timing, Timing)
    }
    base = timings[REFERENCE].median
    new: Speeds = {
        name: {**timing.to_json(), "over_reference": timing.median / base}
        for name, timing in timings.items()
    }
    facts = {"threads": threads, "machine": machine(device), "steps": new | read_speeds(config)}
    text = json.dumps(facts, indent=1) + "\n"
    write_file(config.output_dir / "speeds.json", lambda beside: beside.write_text(text, "utf-8"))


def rows_of_steps(names: Sequence[str]) -> list[Turn]:
    """Return who runs when: a few steps in a row each, as in training, of which the first warms up.

    Args:
        names: Of the variants.
    """
    return [
        Turn(number, name, is_timed=number > 0 and place > 0)
        for number in range(1 + NUM_ROUNDS)
        for name in names
        for place in range(IN_A_ROW)
    ]


def step_of(config: StudyConfig, name: str, start: RemixDiT) -> Step:
    """Return a step of a variant: as many images as a step of the reference."""
    chosen, common = variant(name), common_run(config, Cell(name, config.seed), start)
    run = run_config(chosen, common)
    if chosen.learns_coefficients:
        copies = run.mixture.num_bases - 1
        run = TrainConfig(**{**vars(run), "further_bases": (run.init_from,) * copies})
    parts = independent_runs(chosen, run)
    repeats = len(parts) if chosen.shares_batches else 1
    training, inputs = training_of(parts[0])

    def step(_: int) -> None:
        for _ in range(repeats):
            training.take_step(next(inputs))

    return step


def training_of(run: TrainConfig) -> tuple[Training, Iterator[Any]]:
    """Return a run that has not begun, and the inputs of its steps."""
    start = starting_model(run, outline_of(run))
    training = Training(settled(run, start.config), start, ShardDataset(Path(run.data)), Ranks())
    return training, training.batches()
