"""A study: variants times seeds from the same start at the same budget, and a report.

Every cell is a training run that sees the same images in the same order as all cells of its seed,
then is measured on the same held-out images with the same timesteps and noise. Cells run in
processes of their own, several at once where there is room; a study that was stopped goes on with
the missing cells, and a stopped cell with its remaining steps.

    study/
        config.json              the settings, and the digest of the model to start from
        start/                   a copy of that model, as a run may train on meanwhile
        speeds.json              seconds of a step of every variant, of a study of equal time
        cells/remix/seed-0/      result.json, losses.npz, samples.npz; while it trains, run/
        results.json, table.md, samples.png, report.html
"""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import MISSING, asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from remixdit.data import ShardDataset
from remixdit.data.autoencoder import weights_digest
from remixdit.evaluation.held_out import side_of_shards
from remixdit.evaluation.images import open_extractor
from remixdit.files import new_directory
from remixdit.model.loading import load_model
from remixdit.model.match import match, side_of
from remixdit.model.model import RemixDiT
from remixdit.progress import Progress
from remixdit.study.cell import run_cell
from remixdit.study.config import StudyConfig
from remixdit.study.report import write_study
from remixdit.study.runs import START_DIR, Cell, common_run, parts_of, result_path
from remixdit.study.speeds import measure_speeds, missing_speeds, ratios_of, read_speeds
from remixdit.study.variants import START, chosen_variants, variant
from remixdit.training.run import check_run, claim_run, is_new, only_run, stated_settings
from remixdit.training.start import outline_of, side_of_data

__all__ = ["study"]

# Settings that may differ when a study is resumed.
MAY_CHANGE = {"output_dir", "workers", "device", "variants", "seeds", "name"}
MAY_CHANGE |= {"init_from", "start_digest"}  # the digest is compared, under whatever name


def study(config: StudyConfig) -> Iterator[Progress]:
    """Run the missing cells, then write the report; progress is reported after every cell.

    Raises:
        ValueError: The settings do not fit together, or the directory; another study writes to it.
    """
    cells, start = cells_of(config), load_model(config.init_from)
    refuse_unfit(config, cells, start)
    settings = {**settings_of(config), "start_digest": weights_digest(start)}
    check_study(config.output_dir, settings)
    with only_run(config.output_dir):  # two at once would train the same cells
        claim_run(config.output_dir, settings)
        keep_start(config, start)
        yield from missing_cells(config, cells)


def missing_cells(config: StudyConfig, cells: list[Cell]) -> Iterator[Progress]:
    """Run what is missing of a study, whose directory is its own."""
    missing = [cell for cell in cells if not result_path(config, cell).is_file()]
    done, stage = len(cells) - len(missing), f"study {config.name}"
    yield Progress(stage, done, len(cells))
    if missing and config.is_timed and (names := missing_speeds(config)):
        yield Progress(stage, done, len(cells), f"timing {len(names)} variants")
        in_a_process(config, measure_speeds, names)
    for cell in run_cells(config, missing):
        done += 1
        yield Progress(stage, done, len(cells), f"{cell.variant} {cell.seed}")
        write_results(config, cells)
    write_results(config, cells)


def settings_of(config: StudyConfig) -> dict[str, Any]:
    """Return the settings of a study as JSON values."""
    return {**asdict(config), "output_dir": str(config.output_dir)}


def check_study(directory: Path, settings: dict[str, Any]) -> None:
    """Refuse to resume under other settings, or in a directory that holds no study."""
    stated = stated_settings(directory)
    if stated is None and directory.is_dir() and not is_new(directory):
        raise ValueError(f"output_dir must be empty or hold a study, got {directory}")
    ours = settings["start_digest"]
    if (stated or {}).get("start_digest", ours) != ours:
        raise ValueError(
            f"--from must be the model with which the study in {directory} began, which is kept as "
            f"{directory / START_DIR}, got other weights in {settings['init_from']}"
        )
    defaults = {field.name: field.default for field in fields(StudyConfig)}
    check_run(directory, settings, MAY_CHANGE, {k: v for k, v in defaults.items() if v != MISSING})


def keep_start(config: StudyConfig, start: RemixDiT) -> None:
    """Copy the model to start from into the study: every cell begins with the same weights."""
    directory = config.output_dir / START_DIR
    if not directory.is_dir():
        with new_directory(directory) as beside:
            start.save_pretrained(beside)


def cells_of(config: StudyConfig) -> list[Cell]:
    """Return the runs, seed by seed, so that a stopped study has complete seeds."""
    variants = chosen_variants(config.name, config.variants)
    seeds = range(config.seed, config.seed + config.seeds)
    trained = [Cell(name, seed) for seed in seeds for name in variants if name != START]
    return [Cell(START, config.seed)] * (START in variants) + trained


def refuse_unfit(config: StudyConfig, cells: list[Cell], start: RemixDiT) -> None:
    """Refuse, before any work, settings that would fail in some cell."""
    if config.seeds > 1 and find_spec("scipy") is None:
        raise ValueError(
            f"seeds must be 1 without scipy, which computes intervals over them, got {config.seeds}"
            ": pip install 'remixdit[evaluate]'"
        )
    if config.num_samples:
        open_extractor(config.extractor, config.extractor_weights, torch.device("cpu"))
    held = ShardDataset(Path(config.held_out))
    if config.num_held_out > len(held):
        raise ValueError(
            f"num_held_out must be at most the {len(held)} images of held_out, "
            f"got {config.num_held_out}"
        )
    if start.num_experts > 1:
        raise ValueError(f"--from must be a plain DiT, got {start.num_experts} experts")
    ours = side_of("--from", start.config)
    match(ours, side_of_data(outline_of(common_run(config, cells[0], start))))
    match(ours, side_of_shards(held), subset=True)
    for cell in cells:
        if cell.variant != START:
            refuse_unfit_cell(config, cell, start, len(held))


def refuse_unfit_cell(config: StudyConfig, cell: Cell, start: RemixDiT, num_available: int) -> None:
    """Refuse settings that would fail in a cell."""
    # As all steps take as long: how long they do is measured later.
    parts_of(replace(config, budget="images"), cell, start, "images", {})
    if variant(cell.variant).merges and 2 * config.num_held_out > num_available:
        raise ValueError(
            f"num_held_out must be at most half of the {num_available} images of held_out for "
            f"{cell.variant}, which searches on the others, got {config.num_held_out}"
        )


def run_cells(config: StudyConfig, cells: list[Cell]) -> Iterator[Cell]:
    """Run cells in processes of their own; yield each when it is finished."""
    ratios = ratios_of(read_speeds(config))
    with ThreadPoolExecutor(config.workers) as pool:
        futures = {
            pool.submit(in_a_process, config, run_cell, cell, ratios): cell for cell in cells
        }
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def in_a_process(config: StudyConfig, what: Callable[..., None], *args: object) -> None:
    """Call a function with the study, its arguments and a number of threads, in a new process.

    Each cell has a process of its own: the state of one, such as compiled graphs up to the limit
    of recompilations, must not slow another down. Not by a pool's max_tasks_per_child, which hangs
    where a worker ends while others wait (python/cpython#115634).
    """
    threads = max(1, (os.cpu_count() or 1) // config.workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is loaded there
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
        pool.submit(what, config, *args, threads).result()


def end_with_parent() -> None:
    """End this process as soon as its parent has ended, killed or not.

    The same study, begun again, would train the same cell beside it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_results(config: StudyConfig, cells: list[Cell]) -> None:
    """Write results.json, table.md and report.html of the cells that are finished."""
    found = [result_path(config, cell) for cell in cells]
    results = [json.loads(path.read_text("utf-8")) for path in found if path.is_file()]
    settings = settings_of(config)
    summaries = {name: variant(name).summary for name in {cell.variant for cell in cells}}
    write_study(config.output_dir, settings, results, summaries)
