"""The main job in minutes on a CPU: pre-train a small DiT on real digits, remix it, compare.

Beside the remixed model the plain one is trained further, for as many steps on the same images,
both with timesteps stratified over the same intervals: they differ in the mixture alone.

    quickstart/
        data/           4,500 MNIST digits to train on, 500 held out
        pretrained/     runs, as `remixdit train` makes them
        continued/
        remixed/
        figures/
        report.html     the results
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from remixdit.data import EncodeConfig, ShardDataset, encode, open_source
from remixdit.data.autoencoder import Pixels
from remixdit.diffusion.dit import DiTConfig
from remixdit.distributed import pick_device
from remixdit.evaluation.held_out import held_out
from remixdit.evaluation.losses import interval_losses, loss_matrix
from remixdit.figures import plots
from remixdit.figures.grids import image_grid
from remixdit.figures.html import Block, Commands, Heading, Picture, Table, Text, write_report
from remixdit.files import write_file
from remixdit.model.loading import load_model
from remixdit.model.model import RemixDiT
from remixdit.progress import Progress
from remixdit.sampling.sampler import SamplingConfig, sample
from remixdit.sampling.strips import draw_strips
from remixdit.seeds import generator_for
from remixdit.study.pictures import rows_of_images
from remixdit.training.config import MixtureConfig, ObjectiveConfig, OutputConfig, TrainConfig
from remixdit.training.loop import train
from remixdit.training.optimizer import OptimizerConfig
from remixdit.training.run import read_metrics

__all__ = ["RUNS", "Progress", "QuickstartConfig", "quickstart"]

RUNS = ("pretrained", "continued", "remixed")
IMAGE_SIZE = 24  # instead of 28: a quarter less work, and digits as legible
NUM_HELD_OUT = 500
NUM_MATRIX_IMAGES = 250
DIGITS_PER_CLASS = 4
GUIDANCE_SCALE = 2.5


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Pre-train a small DiT on real digits, remix it, and compare both."""

    output_dir: Path = Path("quickstart")
    """Directory of all results; the same command again resumes."""
    pretrain_steps: int = 1500
    """Number of steps of the plain DiT that both models start from."""
    steps: int = 500
    """Number of steps that the remixed and the continued model each take from there."""
    batch_size: int = 64
    """Number of images in a step."""
    num_bases: int = 4
    """Number of bases, K."""
    num_experts: int = 8
    """Number of experts, N."""
    seed: int = 0
    """Seed of all random draws."""
    device: str = "auto"
    """Device: auto, cpu or cuda. auto is the GPU if there is one."""
    precision: str = "auto"
    """Precision of the arithmetic: fp32, bf16 or auto, which is bf16 where that is fast."""


class Result(NamedTuple):
    """A finished model and its losses."""

    model: RemixDiT
    losses: np.ndarray
    """(I, n) validation losses, each of the expert that owns the interval."""


def quickstart(config: QuickstartConfig, command: str = "remixdit") -> Iterator[Progress]:
    """Run all stages, skipping finished ones; the report is written last.

    Args:
        config: The stages.
        command: How the user calls remixdit, for the commands in the report.
    """
    yield from prepare_digits(config)
    for stage in RUNS:
        for progress in train(stage_config(config, stage)):
            yield progress._replace(stage=stage)
    results: dict[str, Result] = {}
    for stage in RUNS:
        yield Progress(f"measure {stage}", len(results), 3)
        results[stage] = measure(config, stage)
    yield Progress("draw", 0, 1)
    (config.output_dir / "figures").mkdir(exist_ok=True)
    write_results(config, results, command)
    yield Progress("draw", 1, 1)


def prepare_digits(config: QuickstartConfig) -> Iterator[Progress]:
    """Encode the digits once; 500 of them, drawn by the seed, are held out."""
    source = open_source("mnist5k")
    order = torch.randperm(len(source), generator=generator_for(config.seed, "held out")).numpy()
    parts = {"held-out": np.sort(order[:NUM_HELD_OUT]), "train": np.sort(order[NUM_HELD_OUT:])}
    for part, indices in parts.items():
        digits = source.subset(indices, f"mnist5k-{part}")
        yield from encode(digits, data_dir(config, part), EncodeConfig(image_size=IMAGE_SIZE))


def data_dir(config: QuickstartConfig, part: str) -> Path:
    """Return the directory of the digits "train" or "held-out"."""
    return config.output_dir / "data" / part


def stage_config(config: QuickstartConfig, stage: str) -> TrainConfig:
    """Return the run of a stage; "continued" and "remixed" differ in the mixture alone."""
    # Intervals as those of the figures, which are easier to read at equal widths.
    plain = MixtureConfig(num_bases=1, num_experts=1, intervals="uniform")
    # Of the objectives, v learns legible digits in the fewest steps (docs/log.md).
    stratified = ObjectiveConfig(prediction_type="v_prediction", timestep_strata=config.num_experts)
    pretrained = TrainConfig(
        data=str(data_dir(config, "train")),
        output_dir=config.output_dir / "pretrained",
        steps=config.pretrain_steps,
        batch_size=config.batch_size,
        seed=config.seed,
        device=config.device,
        precision=pick_precision(config.precision),
        network=DiTConfig(hidden_size=96, depth=4, num_heads=4, patch_size=4, learn_sigma=False),
        mixture=plain,
        objective=stratified,
        optimizer=OptimizerConfig(
            learning_rate=3e-3, betas=(0.9, 0.99), warmup_steps=50, ema_decay=0.995
        ),
        output=OutputConfig(
            log_every=50,
            save_every=250,
            keep_checkpoints=1,
            sample_every=None,
            sample_images=10,
            sample_inference_steps=25,
        ),
    )
    if stage == "pretrained":
        return pretrained
    continued = replace(
        pretrained,
        output_dir=config.output_dir / stage,
        init_from=str(config.output_dir / "pretrained"),
        steps=config.steps,
        optimizer=replace(pretrained.optimizer, warmup_steps=0, lr_schedule="cosine"),
        seed=config.seed + 1,
    )
    if stage == "continued":
        return continued
    mixture = replace(plain, num_bases=config.num_bases, num_experts=config.num_experts)
    return replace(continued, mixture=mixture, objective=replace(stratified, timestep_strata=0))


def pick_precision(name: str) -> str:
    """Return "bf16" for "auto" where the hardware multiplies bfloat16 fast, else "fp32"."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"


def measure(config: QuickstartConfig, stage: str) -> Result:
    """Measure a finished run on the held-out digits; all stages see the same noise."""
    model = load_model(config.output_dir / stage, device=str(pick_device(config.device)))
    held = held_out(ShardDataset(data_dir(config, "held-out")), NUM_HELD_OUT, model.config)
    intervals = model.intervals.uniform(config.num_experts)
    return Result(model, interval_losses(model, held, intervals, seed=config.seed)[0])


def sampling_of_digits(config: QuickstartConfig) -> SamplingConfig:
    """Return how a few digits of every class are drawn, class after class in columns."""
    return SamplingConfig(
        num_images=10 * DIGITS_PER_CLASS,
        guidance_scale=GUIDANCE_SCALE,
        scheduler="ddim",
        num_inference_steps=50,
        seed=config.seed,
    )


def summary_table(config: QuickstartConfig, results: dict[str, Result]) -> Table:
    """Return images seen, time and mean validation loss of each model."""
    rows: list[list[str | int | float]] = []
    base = results["continued"].losses.mean(0)  # (n,) paired with every other model's
    for name, result in results.items():
        run_dir = config.output_dir / name
        steps = json.loads((run_dir / "config.json").read_text())["steps"]
        difference = result.losses.mean(0) - base
        error = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
        change = f"{100 * difference.mean() / base.mean():+.2f} ± {100 * error / base.mean():.2f} %"
        rows.append(
            [
                name,
                steps * config.batch_size,
                f"{training_seconds(run_dir, config.batch_size):.0f}",
                f"{result.losses.mean():.5f}",
                change if name != "continued" else "",
            ]
        )
    header = ["model", "images seen", "training seconds", "validation loss", "against continued"]
    return Table(header, rows, caption=TABLE_CAPTION)


TABLE_CAPTION = (
    "Mean over the intervals of the squared error of the prediction, on digits that no model "
    "was trained on, with the same timesteps and noise for every model; ± is the 95 % interval of "
    "the paired difference over images. Both models start from the pre-trained one and see the "
    "same images, timesteps stratified over the same intervals."
)


def training_seconds(run_dir: Path, batch_size: int) -> float:
    """Return the seconds that a run's steps took, according to its metrics."""
    seconds, before = 0.0, 0
    for row in read_metrics(run_dir):
        seconds += (row["step"] - before) * batch_size / row["images_per_second"]
        before = row["step"]
    return seconds


def curves(config: QuickstartConfig) -> dict[str, tuple[list[int], list[float]]]:
    """Return the training loss of the two models, by step."""
    found = {}
    for name in ("continued", "remixed"):
        rows = read_metrics(config.output_dir / name)
        found[name] = ([row["step"] for row in rows], [row["mse"] for row in rows])
    return found


def write_results(config: QuickstartConfig, results: dict[str, Result], command: str) -> None:
    """Draw the figures, and write the report around them."""
    pictures: dict[str, Figure | Image.Image] = {
        **pictures_of_digits(config, results),
        **plots_of(config, results),
    }
    for name, picture in pictures.items():
        path = config.output_dir / "figures" / f"{name}.png"
        if isinstance(picture, Image.Image):
            write_file(path, partial(picture.save, format="png"))
        else:
            write_file(path, partial(plots.save, picture))

    def shown(figures: Sequence[tuple[str, str, str]]) -> list[Block]:
        return [Picture(pictures[name], caption, alt) for name, caption, alt in figures]

    seconds = (
        training_seconds(config.output_dir / name, config.batch_size)
        for name in ("remixed", "continued")
    )
    blocks: list[Block] = [
        Text(INTRODUCTION.format(**vars(config))),
        Heading("Digits"),
        *shown(DIGITS),
        Heading("Is it better?"),
        summary_table(config, results),
        Text(WHY_LONGER.format(next(seconds) / next(seconds), **vars(config))),
        *shown(FIGURES),
        Heading("Do it again"),
        Commands([f"{command} {shlex.join(words)}" for words in next_commands(config)]),
    ]
    write_report(config.output_dir / "report.html", "Remix-DiT quickstart", blocks)


def pictures_of_digits(
    config: QuickstartConfig, results: dict[str, Result]
) -> dict[str, Image.Image]:
    """Draw digits with every model, all from the same noise."""
    sampling, remixed = sampling_of_digits(config), results["remixed"].model
    drawn = {
        name: np.concatenate([batch.images for batch in sample(result.model, Pixels(), sampling)])
        for name, result in results.items()
    }
    names, summary = [str(digit) for digit in range(10)], sampling.summary(remixed)
    return {
        "digits": rows_of_images(drawn, names, f"The same noise through every model\n{summary}"),
        "strips": draw_strips(remixed, Pixels(), sampling, "remixed"),
        "digits-remixed": image_grid(drawn["remixed"], 10, names, title=f"remixed\n{summary}"),
    }


def plots_of(config: QuickstartConfig, results: dict[str, Result]) -> dict[str, Figure]:
    """Draw losses and coefficients."""
    remixed = results["remixed"].model
    boundaries = remixed.intervals.boundaries
    shards = ShardDataset(data_dir(config, "held-out"))
    held = held_out(shards, NUM_MATRIX_IMAGES, remixed.config)
    series = {name: results[name].losses.mean(1) for name in ("continued", "remixed", "pretrained")}
    tables = remixed.experts.coefficients().detach().cpu().numpy()[0]
    matrix = loss_matrix(remixed, held, seed=config.seed)
    title = f"remixed: {config.num_experts} experts mixed from {config.num_bases} bases"
    return {
        "loss-by-interval": plots.loss_by_interval(
            series, boundaries, title="Validation loss by interval"
        ),
        "coefficients": plots.coefficients_heatmap(tables, boundaries, title=title),
        "loss-matrix": plots.loss_matrix(
            matrix, boundaries, title="remixed: every expert on every interval"
        ),
        "loss-curve": plots.loss_curve(curves(config), title="Training loss"),
    }


INTRODUCTION = (
    "A small diffusion transformer was trained for {pretrain_steps} steps on 4,500 handwritten "
    "digits (MNIST). Then it went on in two ways, {steps} steps of {batch_size} images each: as it "
    "is (continued), and as {num_experts} experts mixed from {num_bases} bases (remixed), which "
    "cost a step of sampling no more than the plain network does."
)

WHY_LONGER = (
    "Remixed training took {:.2f} times as long as continued training: every step mixes the "
    "weights of {num_experts} experts, computes the gradients of {num_bases} bases, and updates "
    "{num_bases} times the weights. That cost depends on the size of the network alone, so its "
    "share falls as batches and images grow: these digits are as small as they get. A step of "
    "sampling costs what it costs with the plain network."
)

DIGITS = (
    (
        "digits",
        "A row a model: the plain one that both start from, trained further, and remixed.",
        "Digits 0 to 9, drawn by three models",
    ),
    (
        "strips",
        "How four digits come about: the finished digit that the network predicts, at 8 of the "
        "steps. The colour of a frame says which expert took the step.",
        "Four digits from noise to the finished image, framed by expert",
    ),
    ("digits-remixed", "More digits of the remixed model.", "Grid of digits 0 to 9"),
)

FIGURES = (
    (
        "loss-by-interval",
        "Validation loss in each interval of timesteps; below, against the continued model.",
        "Loss by interval of three models",
    ),
    (
        "coefficients",
        "What each expert is mixed from (as figure 4a of arXiv:2412.05628).",
        "Heat map of coefficients",
    ),
    (
        "loss-matrix",
        "Loss of every expert on every interval, above the best of the column (figure 4c).",
        "Matrix of losses of experts by intervals",
    ),
    ("loss-curve", "Loss on the training images.", "Training loss of two models by step"),
)


def next_commands(config: QuickstartConfig) -> list[list[str]]:
    """Return the words of commands for the next steps of a user."""
    run = config.output_dir
    remixed, pretrained = f"{run}/remixed", f"{run}/pretrained"
    drawn = ["--num-images", "100", "--guidance-scale", "2.5", "--output", f"{run}/digits.png"]
    mine = ["--from", pretrained, "--output-dir", f"{run}/mine"]
    objective = ["--prediction-type", "v_prediction", "--steps", "200"]
    return [
        ["sample", remixed, *drawn],
        ["demo", remixed, "--against", pretrained],
        ["info", remixed],
        ["plot", remixed],
        ["train", "tiny", "--data", f"{run}/data/train", *mine, *objective],
    ]
