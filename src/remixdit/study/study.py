"""A study: variants times seeds from the same start at the same budget, and a report.

Every cell is a training run that sees the same images in the same order as all cells of its seed,
then is measured on the same held-out images with the same timesteps and noise. Cells run in
processes of their own, several at once where there is room; a study that was stopped goes on with
the missing cells, and a stopped cell with its remaining steps.

    study/
        config.json              the settings
        cells/remix/seed-0/      result.json, losses.npz, samples.npz; while it trains, run/
        results.json, table.md, samples.png, report.html

Shapes: I intervals of the measurement, n held-out images.
"""

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from remixdit.data import ShardDataset
from remixdit.data.autoencoder import load_autoencoder
from remixdit.diffusion.costs import training_flops
from remixdit.diffusion.intervals import Intervals
from remixdit.distributed import pick_device
from remixdit.evaluation.feature_sets import FeatureSet, image_features, reference_features
from remixdit.evaluation.features import Extractor, load_extractor, metric_name
from remixdit.evaluation.held_out import held_out, side_of_shards
from remixdit.evaluation.image_sets import open_images
from remixdit.evaluation.losses import interval_losses
from remixdit.evaluation.metrics import frechet_distance, gaussian, kernel_distance
from remixdit.files import write_file
from remixdit.machine import machine
from remixdit.model.loading import load_model
from remixdit.model.match import match, side_of
from remixdit.model.model import RemixDiT
from remixdit.progress import Progress, finish
from remixdit.sampling.sampler import SamplingConfig, labels_of, sample
from remixdit.study.config import StudyConfig
from remixdit.study.pictures import save_samples
from remixdit.study.report import write_study
from remixdit.study.variants import START, chosen_variants, independent_runs, run_config, variant
from remixdit.training.config import MixtureConfig, ObjectiveConfig, OutputConfig, TrainConfig
from remixdit.training.loop import train
from remixdit.training.optimizer import OptimizerConfig
from remixdit.training.run import check_run, claim_run, read_metrics
from remixdit.training.start import outline_of, side_of_data, training_strata

__all__ = ["study"]

# Intervals of the measurement: no coarser than any usual N, so that curves compare.
NUM_INTERVALS = 40
NUM_REFERENCE = 5000  # held-out images that samples are scored against, at most

# Settings that may differ when a study is resumed.
MAY_CHANGE = {"output_dir", "workers", "device", "variants", "seeds", "name"}


class Cell(NamedTuple):
    """One run of a study, of one variant and one seed."""

    variant: str
    seed: int


def study(config: StudyConfig) -> Iterator[Progress]:
    """Run the missing cells, then write the report; progress is reported after every cell."""
    cells = cells_of(config)
    refuse_unfit(config, cells)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {**asdict(config), "output_dir": str(config.output_dir)}
    check_study(config.output_dir, settings)
    claim_run(config.output_dir, settings)
    missing = [cell for cell in cells if not result_path(config, cell).is_file()]
    done, stage = len(cells) - len(missing), f"study {config.name}"
    yield Progress(stage, done, len(cells))
    for cell in run_cells(config, missing):
        done += 1
        yield Progress(stage, done, len(cells), f"{cell.variant} {cell.seed}")
        write_results(config, cells)
    write_results(config, cells)


def check_study(directory: Path, settings: dict[str, Any]) -> None:
    """Refuse to resume under other settings, or in a directory that holds no study."""
    path = directory / "config.json"
    if not path.is_file() and any(directory.iterdir()):
        raise ValueError(f"output_dir must be empty or hold a study, got {directory}")
    defaults = {field.name: field.default for field in fields(StudyConfig)}
    check_run(directory, settings, MAY_CHANGE, {k: v for k, v in defaults.items() if v != MISSING})


def cells_of(config: StudyConfig) -> list[Cell]:
    """Return the runs, seed by seed, so that a stopped study has complete seeds."""
    variants = chosen_variants(config.name, config.variants)
    seeds = range(config.seed, config.seed + config.seeds)
    trained = [Cell(name, seed) for seed in seeds for name in variants if name != START]
    return [Cell(START, config.seed)] * (START in variants) + trained


def refuse_unfit(config: StudyConfig, cells: list[Cell]) -> None:
    """Refuse, before any work, settings that would fail in some cell."""
    held = ShardDataset(Path(config.held_out))
    if config.num_held_out > len(held):
        raise ValueError(
            f"num_held_out must be at most the {len(held)} images of held_out, "
            f"got {config.num_held_out}"
        )
    start = load_model(config.init_from)
    if start.num_experts > 1:
        raise ValueError(f"--from must be a plain DiT, got {start.num_experts} experts")
    ours = side_of("--from", start.config)
    match(ours, side_of_data(outline_of(common_run(config, cells[0], start))))
    match(ours, side_of_shards(held), subset=True)
    for cell in cells:
        if cell.variant != START:
            run_config(variant(cell.variant), common_run(config, cell, start))


def run_cells(config: StudyConfig, cells: list[Cell]) -> Iterator[Cell]:
    """Run cells in processes of their own; yield each when it is finished."""
    if not cells:
        return
    threads = max(1, (os.cpu_count() or 1) // config.workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is loaded there
    context = multiprocessing.get_context("spawn")
    # A process of its own for each cell: the state of one, such as compiled graphs up to the limit
    # of recompilations, must not slow another down.
    with ProcessPoolExecutor(config.workers, mp_context=context, max_tasks_per_child=1) as pool:
        futures: dict[Future[None], Cell] = {
            pool.submit(run_cell, config, cell, threads): cell for cell in cells
        }
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_cell(config: StudyConfig, cell: Cell, threads: int) -> None:
    """Train and measure one cell; its result is written last."""
    torch.set_num_threads(threads)
    directory = cell_dir(config, cell)
    directory.mkdir(parents=True, exist_ok=True)
    device, start = pick_device(config.device), load_model(config.init_from)
    result: dict[str, Any] = {"variant": cell.variant, "seed": cell.seed, "images": 0}
    if cell.variant == START:
        model = start.to(device)
    else:
        run = run_config(variant(cell.variant), common_run(config, cell, start))
        parts = independent_runs(variant(cell.variant), run)
        for part in parts:
            finish(train(part))
        half = trained_model(parts, f"checkpoints/step-{parts[0].steps // 2:08d}").to(device)
        result["half"] = {"images": run.steps // 2 * run.batch_size, **measured(config, half)[0]}
        model = trained_model(parts).to(device)
        result |= cost_of(run, parts, model)
        coefficients = model.experts.coefficients().detach()
        result["coefficients"] = coefficients.tolist() if model.num_experts <= 20 else None
    facts_of_losses, losses = measured(config, model)
    result |= {**facts_of_losses, "machine": machine(model.device)}
    np.savez_compressed(directory / "losses.npz", losses=losses.astype(np.float32))
    if config.num_samples:
        result["scores"] = scored(config, model, directory)
    text = json.dumps(result, indent=1) + "\n"
    write_file(result_path(config, cell), lambda beside: beside.write_text(text, "utf-8"))
    shutil.rmtree(directory / "run" / "checkpoints", ignore_errors=True)  # needed until here


def trained_model(parts: Sequence[TrainConfig], where: str = "") -> RemixDiT:
    """Return the model of a run, or of the runs of independent experts."""
    models = [load_model(part.output_dir / where) for part in parts]
    if len(models) == 1:
        return models[0]
    strata = training_strata(models[0].config, parts[0])
    first = models[0].config
    return RemixDiT.from_experts(
        [model.expert(0) for model in models],
        strata.boundaries,
        prediction_type=first.prediction_type,
        num_train_timesteps=first.num_train_timesteps,
        class_names=first.class_names,
        autoencoder=first.autoencoder,
    )


def common_run(config: StudyConfig, cell: Cell, start: RemixDiT) -> TrainConfig:
    """Return the run of a cell, without the changes of its variant."""
    steps = max(1, round(config.steps * variant(cell.variant).share))
    return TrainConfig(
        data=config.data,
        output_dir=cell_dir(config, cell) / "run",
        init_from=config.init_from,
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
            keep_checkpoints=3,
            tensorboard=False,
        ),
    )


def cost_of(run: TrainConfig, parts: Sequence[TrainConfig], model: RemixDiT) -> dict[str, Any]:
    """Return the cost of a cell: images, operations, and the seconds of its steps.

    Args:
        run: Run of the cell.
        parts: Runs in which the cell was trained.
        model: Trained model.
    """
    images = sum(part.steps * part.batch_size for part in parts)
    mixing = 0 if len(parts) > 1 else run.steps * mixing_flops(model, run.strata_per_step)
    speeds = [row["images_per_second"] for part in parts for row in read_metrics(part.output_dir)]
    return {
        "images": images,
        "network_flops": images * training_flops(model.config.network),
        "intervals": run.interval_policy,
        "mixing_flops": mixing,
        # The median of the windows, as other work may disturb some of them.
        "seconds": images / median(speeds),
        "num_bases": model.num_bases,
        "num_experts": model.num_experts,
        "experts_per_step": 1 if len(parts) > 1 else run.strata_per_step,
    }


def mixing_flops(model: RemixDiT, experts_per_step: int) -> int:
    """Return the operations of a step beyond a plain one: mixing, and updates of more bases."""
    if model.num_experts == 1:
        return 0
    mixed = sum(bases[0].numel() for bases in model.experts.bases().values())
    update = 16  # operations of AdamW and the average for each parameter
    return mixed * (4 * experts_per_step * model.num_bases + update * (model.num_bases - 1))


def measured(config: StudyConfig, model: RemixDiT) -> tuple[dict[str, Any], np.ndarray]:
    """Return the validation loss, with that of each interval, and all losses (I, n)."""
    shards = ShardDataset(Path(config.held_out))
    held = held_out(shards, config.num_held_out, model.config)
    if model.config.is_flow:
        intervals = Intervals.continuous(NUM_INTERVALS)
    else:
        intervals = Intervals.uniform(NUM_INTERVALS, model.config.num_train_timesteps)
    losses = interval_losses(model, held, intervals, seed=config.seed)[0]
    found = {"loss": float(losses.mean()), "loss_by_interval": losses.mean(1).tolist()}
    return found, losses


def scored(config: StudyConfig, model: RemixDiT, directory: Path) -> dict[str, Any]:
    """Draw samples and score them against the held-out images; all cells draw the same noise."""
    extractor = load_extractor(
        config.extractor, weights=config.extractor_weights, device=model.device
    )
    sampling = SamplingConfig(
        num_images=config.num_samples,
        guidance_scale=config.guidance_scale,
        scheduler="euler" if model.config.is_flow else "ddim",
        num_inference_steps=config.num_inference_steps,
        seed=config.seed,
        batch_size=50,
    )
    autoencoder = load_autoencoder(model.config.autoencoder, model.device)
    drawn = np.concatenate([batch.images for batch in sample(model, autoencoder, sampling)])
    labels = labels_of(model, sampling).tolist()
    save_samples(directory, drawn, labels, model.config.class_names, sampling.summary(model))
    real = reference_of(config, extractor)
    fake = image_features(np.split(drawn, range(64, len(drawn), 64)), extractor)
    kernel = kernel_distance(real.pool, fake.pool)
    frechet = frechet_distance(gaussian(real.pool), gaussian(fake.pool))
    found = {
        "KID": {"value": kernel.value, "standard_error": kernel.standard_error},
        "FID": {"value": frechet},  # its error would take longer than the cell's training
    }
    named = {metric_name(name, extractor.name): score for name, score in found.items()}
    return {"sampling": asdict(sampling), **extractor.facts(), "scores": named}


def reference_of(config: StudyConfig, extractor: Extractor) -> FeatureSet:
    """Return the features of the held-out images, extracted once for all cells."""
    path = config.output_dir / f"reference-{config.extractor}.npz"
    if not path.is_file():
        images = open_images(config.held_out, device=extractor.device)
        found = reference_features(images, extractor, NUM_REFERENCE)
        kept = {name: v.cpu().numpy() for name, v in found._asdict().items() if v is not None}

        def write(beside: Path) -> None:
            with beside.open("wb") as file:  # np.savez would add a suffix
                np.savez(file, **kept)

        write_file(path, write, shared=True)  # cells run at once
    with np.load(path) as file:
        kept = {name: torch.from_numpy(file[name]).to(extractor.device) for name in file.files}
    return FeatureSet(**kept)


def cell_dir(config: StudyConfig, cell: Cell) -> Path:
    """Return the directory of a cell."""
    return config.output_dir / "cells" / cell.variant / f"seed-{cell.seed}"


def result_path(config: StudyConfig, cell: Cell) -> Path:
    """Return the file whose existence marks a finished cell."""
    return cell_dir(config, cell) / "result.json"


def write_results(config: StudyConfig, cells: list[Cell]) -> None:
    """Write results.json, table.md and report.html of the cells that are finished."""
    found = [result_path(config, cell) for cell in cells]
    results = [json.loads(path.read_text("utf-8")) for path in found if path.is_file()]
    settings = {**asdict(config), "output_dir": str(config.output_dir)}
    summaries = {name: variant(name).summary for name in {cell.variant for cell in cells}}
    write_study(config.output_dir, settings, results, summaries)
