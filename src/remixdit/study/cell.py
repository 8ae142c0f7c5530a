"""One cell of a study: train, measure, and write the result last.

    cells/remix/seed-0/
        result.json           its existence marks a finished cell
        losses.npz            (I, n) losses after equal images; losses-seconds.npz: equal seconds
        samples.npz           the first images
        kernel.npz            what each image contributes to the kernel distance; kernel-seconds.npz

Shapes: I intervals of the measurement, n held-out images.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from remixdit.data import ShardDataset
from remixdit.data.autoencoder import load_autoencoder
from remixdit.diffusion.costs import training_flops
from remixdit.diffusion.intervals import Intervals
from remixdit.diffusion.noise import Diffusion
from remixdit.distributed import pick_device
from remixdit.evaluation.feature_sets import FeatureSet, image_features, reference_features
from remixdit.evaluation.features import Extractor, metric_name
from remixdit.evaluation.held_out import HeldOut, held_out
from remixdit.evaluation.image_sets import open_images
from remixdit.evaluation.images import open_extractor
from remixdit.evaluation.losses import interval_losses
from remixdit.evaluation.merging import MergeConfig, search
from remixdit.evaluation.metrics import frechet_distance, gaussian, kernel_shifts
from remixdit.files import write_file
from remixdit.images.npy import npz_array, npz_names
from remixdit.machine import machine
from remixdit.model.loading import load_model
from remixdit.model.merging import merged
from remixdit.model.model import RemixDiT
from remixdit.progress import finish
from remixdit.sampling.sampler import SamplingConfig, labels_of, sample
from remixdit.study.config import StudyConfig
from remixdit.study.pictures import save_samples
from remixdit.study.runs import (
    REFERENCE,
    START_DIR,
    Cell,
    cell_dir,
    first_parts,
    goals_of,
    parts_of,
    result_path,
    speed_name,
    steps_before,
)
from remixdit.study.speeds import Speeds, ratios_of, read_speeds
from remixdit.study.variants import START, variant
from remixdit.training.config import TrainConfig
from remixdit.training.loop import train
from remixdit.training.run import read_metrics
from remixdit.training.strata import training_strata

__all__ = ["run_cell"]

# Intervals of the measurement: no coarser than any usual N, so that curves compare.
NUM_INTERVALS = 40
NUM_REFERENCE = 5000  # held-out images that samples are scored against, at most
PARTS = ("least noisy quarter", "middle", "most noisy quarter")  # of the fall of the log-SNR


def run_cell(config: StudyConfig, cell: Cell, ratios: dict[str, float], threads: int) -> None:
    """Train and measure one cell; its result is written last.

    Args:
        config: The study.
        cell: The cell.
        ratios: Seconds of a step of each variant over those of the reference.
        threads: Number of threads.
    """
    torch.set_num_threads(threads)
    directory = cell_dir(config, cell)
    directory.mkdir(parents=True, exist_ok=True)
    device, start = pick_device(config.device), load_model(config.output_dir / START_DIR)
    result: dict[str, Any] = {"variant": cell.variant, "seed": cell.seed, "images": 0}
    if cell.variant == START:
        model = start.to(device)
        result |= facts_of(config, model, directory)
        if config.is_timed:
            result["equal_seconds"] = {**result, "seconds": 0, "steps": 0}
            copy_of_start(directory)
    else:
        result |= trained(config, cell, start, ratios)
    result["machine"] = machine(device)
    text = json.dumps(result, indent=1) + "\n"
    write_file(result_path(config, cell), lambda beside: beside.write_text(text, "utf-8"))
    for path in directory.glob("**/checkpoints"):
        shutil.rmtree(path, ignore_errors=True)  # needed until here


def copy_of_start(directory: Path) -> None:
    """Write what was measured of the start as that of its equal seconds, which are none."""
    for path in (directory / "losses.npz", directory / "kernel.npz"):
        if path.is_file():
            shutil.copyfile(path, path.with_stem(f"{path.stem}-seconds"))


def trained(
    config: StudyConfig, cell: Cell, start: RemixDiT, ratios: dict[str, float]
) -> dict[str, Any]:
    """Train a cell to its goals, the nearer one first, and measure it at each.

    Args:
        config: The study.
        cell: The cell.
        start: Model that the study starts from.
        ratios: Seconds of a step of each variant over those of the reference.
    """
    directory, device = cell_dir(config, cell), pick_device(config.device)
    first = first_parts(config, cell, start, ratios)
    for part in first:
        finish(train(part))
    result: dict[str, Any] = {}
    goals = goals_of(config, cell.variant, ratios)
    for goal, steps in sorted(goals.items(), key=lambda item: item[1]):
        parts = parts_of(config, cell, start, goal, ratios)
        for part in parts:
            finish(train(part))
        model = trained_model(parts).to(device)
        found = cost_of(parts, first, model)
        if variant(cell.variant).merges:
            model = merged(model, searched_weights(config, model))
        if goal == "seconds":
            found |= facts_of(config, model, directory, "-seconds")
            found["seconds"] = seconds_by_turns(config, cell, steps, read_speeds(config))
            result["equal_seconds"] = {"steps": steps, **found}
            continue
        result |= {**found, **facts_of(config, model, directory)}
        coefficients = model.experts.coefficients().detach()
        result["coefficients"] = coefficients.tolist() if model.num_experts <= 20 else None
        if not first and not variant(cell.variant).merges:
            result["half"] = half_way(config, parts)
    return result


def seconds_by_turns(config: StudyConfig, cell: Cell, steps: int, speeds: Speeds) -> float:
    """Return the seconds of a cell by the medians of steps that took turns.

    Those of its own log hold whatever other work ran beside it.
    """
    chosen = variant(cell.variant)
    ratios, base = ratios_of(speeds), speeds[REFERENCE]["median_ms"] / 1000
    total = steps * ratios[speed_name(cell.variant)]
    if chosen.first:
        total += steps_before(config, chosen, ratios) * ratios[speed_name(chosen.first)]
    return float(total * base)


def half_way(config: StudyConfig, parts: Sequence[TrainConfig]) -> dict[str, Any]:
    """Return what a cell had after half of its steps."""
    half = trained_model(parts, f"checkpoints/step-{parts[0].steps // 2:08d}")
    images = sum(part.steps // 2 * part.batch_size for part in parts)
    return {"images": images, **measured(config, half.to(pick_device(config.device)))[0]}


def searched_weights(config: StudyConfig, model: RemixDiT) -> torch.Tensor:
    """Return the best combination of experts (N,), found on images that are not measured on."""
    shards = ShardDataset(Path(config.held_out))
    both = held_out(shards, 2 * config.num_held_out, model.config)
    rest = HeldOut(*(values[config.num_held_out :] for values in both))
    return min(finish(search(model, rest, MergeConfig())), key=lambda found: found.loss).weights


def facts_of(
    config: StudyConfig, model: RemixDiT, directory: Path, suffix: str = ""
) -> dict[str, Any]:
    """Measure and score a model; files get a suffix."""
    facts, losses = measured(config, model)
    np.savez_compressed(directory / f"losses{suffix}.npz", losses=losses.astype(np.float32))
    if config.num_samples:
        facts["scores"] = scored(config, model, directory, suffix)
    return facts


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


def cost_of(
    parts: Sequence[TrainConfig], first: Sequence[TrainConfig], model: RemixDiT
) -> dict[str, Any]:
    """Return the cost of a cell: images, operations, and the seconds of its steps.

    Args:
        parts: Runs in which the cell was trained.
        first: Runs of the plain variant that went first.
        model: Trained model.
    """
    images = sum(part.steps * part.batch_size for part in (*parts, *first))
    own = parts[0]
    mixing = 0 if len(parts) > 1 else own.steps * mixing_flops(model, own.strata_per_step)
    return {
        "images": images,
        "network_flops": images * training_flops(model.config.network),
        "intervals": own.interval_policy,
        "mixing_flops": mixing,
        "seconds": sum(seconds_of(part) for part in (*parts, *first)),
        "num_bases": model.num_bases,
        "num_experts": model.num_experts,
        "experts_per_step": 1 if len(parts) > 1 else own.strata_per_step,
    }


def seconds_of(run: TrainConfig) -> float:
    """Return the seconds of a run by the median of its windows, some of which may be disturbed."""
    speeds = [row["images_per_second"] for row in read_metrics(run.output_dir)]
    return run.steps * run.batch_size / median(speeds)


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
    means = losses.mean(1)
    found = {
        "loss": float(losses.mean()),
        "loss_by_interval": means.tolist(),
        "loss_of_part": dict(zip(PARTS, loss_of_parts(model, intervals, means), strict=True)),
    }
    return found, losses


def loss_of_parts(model: RemixDiT, intervals: Intervals, losses: np.ndarray) -> list[float]:
    """Return the mean loss of the least noisy quarter of the log-SNR, the middle, and the noisiest.

    Args:
        model: Model whose noise process decides.
        intervals: Intervals of the measurement.
        losses: (I,) losses.
    """
    ends = torch.tensor(intervals.boundaries, dtype=torch.float64)
    middles = (ends[1:] + ends[:-1]) / 2
    process = model.process
    if isinstance(process, Diffusion):
        curve = process.log_snr.cpu()[middles.long()]
    else:
        curve = process.log_snr(middles)
    fall = ((curve[0] - curve) / (curve[0] - curve[-1])).numpy()
    chosen = (fall < 0.25, (fall >= 0.25) & (fall <= 0.75), fall > 0.75)
    return [float(losses[rows].mean()) for rows in chosen]


def scored(
    config: StudyConfig, model: RemixDiT, directory: Path, suffix: str = ""
) -> dict[str, Any]:
    """Draw samples and score them against the held-out images; all cells draw the same noise."""
    extractor = open_extractor(config.extractor, config.extractor_weights, model.device)
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
    if not suffix:
        labels = labels_of(model, sampling).tolist()
        save_samples(directory, drawn, labels, model.config.class_names, sampling.summary(model))
    real = reference_of(config, extractor)
    fake = image_features(np.split(drawn, range(64, len(drawn), 64)), extractor)
    kernel = kernel_shifts(real.pool, fake.pool)
    np.savez_compressed(
        directory / f"kernel{suffix}.npz",
        real=kernel.real_shifts.cpu().numpy(),
        fake=kernel.fake_shifts.cpu().numpy(),
    )
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
    stored = {name: npz_array(path, name) for name in npz_names(path)}
    if not {"pool"} <= stored.keys() <= set(FeatureSet._fields):
        raise ValueError(f"{path} must hold features, got {', '.join(stored)}: remove it")
    return FeatureSet(
        **{name: torch.from_numpy(values).to(extractor.device) for name, values in stored.items()}
    )
