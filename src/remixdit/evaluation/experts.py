"""Experts against intervals on held-out images: losses, the matrix, bits, and a paired rival.

Every model sees the same images, timesteps and noise, so that a difference of losses is one of
weights; errors are over the images, which stand for those that were not drawn. Processes share
the intervals, so their number changes nothing.

Shapes: n held-out images, I intervals, N experts.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from remixdit import distributed
from remixdit.data import ShardDataset, is_shard_dir
from remixdit.diffusion.dit import DiTConfig
from remixdit.diffusion.intervals import Intervals
from remixdit.distributed.ranks import Ranks
from remixdit.evaluation.bits import bound_strata, no_bound, prior_bits, stratum_bits
from remixdit.evaluation.image_sets import open_images
from remixdit.evaluation.losses import Held, losses_on
from remixdit.evaluation.metrics import Estimate
from remixdit.images.source import UNLABELLED
from remixdit.machine import machine
from remixdit.model.model import RemixDiT
from remixdit.progress import Progress
from remixdit.seeds import generator_for

__all__ = ["IntervalConfig", "Rival", "evaluate_intervals", "open_held"]

PLAIN_INTERVALS = 10  # of a model with one expert
MATRIX_IMAGES = 250
MATRIX_EXPERTS = 100  # above, the matrix must be asked for
NUM_IMAGES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class IntervalConfig:
    """What a per-interval evaluation measures."""

    against: str | None = None
    """Another model, measured on the same images, timesteps and noise."""
    num_intervals: int = 0
    """Measure on so many equal intervals instead of the experts' own (10 for a plain DiT)."""
    matrix_images: int | None = None
    """Images that every expert sees on every interval; 250, or none past 100 experts."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("num_intervals", "matrix_images"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


class Rival(NamedTuple):
    """The other model."""

    name: str
    model: RemixDiT


def open_held(
    path: str, model: RemixDiT, num_images: int = 0, split: str | None = None, seed: int = 0
) -> tuple[Held, dict[str, Any]]:
    """Return held-out images as a model sees them, and what is known of them.

    Args:
        path: Shards that fit the model, or, for a model of pixels, any collection of images.
        model: Whose latents they become.
        num_images: How many are drawn by `seed`; 0 for all, up to 1,000.
        split: Which part of a collection.
        seed: Of the draw, and of the posterior of latents.
    """
    if not path:
        raise ValueError("reference must be given: held-out images")
    network = model.config.network
    if is_shard_dir(Path(path)):
        held, names, fingerprint = held_of_shards(path, model, num_images, split, seed)
    elif model.config.autoencoder["name"] != "none":
        raise ValueError(
            f"reference must be shards for a model of latents, got {path}: `remixdit encode` "
            "makes them"
        )
    else:
        images = open_images(path, split, network.input_size, network.in_channels)
        drawn = images.drawn(checked_count(num_images, len(images), path), seed)
        parts = list(drawn.batches())
        rows = np.concatenate([part.rows for part in parts])
        pixels = torch.from_numpy(np.concatenate([part.images for part in parts]))
        latents = pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        held = Held(latents.contiguous(), torch.from_numpy(drawn.class_labels[rows]))
        names, fingerprint = images.class_names, images.fingerprint
    labelled = known_labels(held.class_labels, names, model, path)
    facts = {
        "path": path,
        "split": split,
        "num_images": len(held.latents),
        "fingerprint": fingerprint,
        "labelled": bool(names) and bool(network.num_classes),
    }
    return Held(held.latents, labelled), facts


def held_of_shards(
    path: str, model: RemixDiT, num_images: int, split: str | None, seed: int
) -> tuple[Held, tuple[str, ...], str]:
    """Return images of shards, the names of their classes and the fingerprint of their source."""
    if split is not None:
        raise ValueError(f"split must be left out for shards, got {split!r} for {path}")
    dataset, network = ShardDataset(path), model.config.network
    shape = (network.in_channels, network.input_size, network.input_size)
    dataset.require(model.config.autoencoder, shape)
    count = checked_count(num_images, len(dataset), path)
    order = torch.randperm(len(dataset), generator=generator_for(seed, "drawn images"))
    rows = np.sort(order[:count].numpy())
    latents, labels = dataset.read(rows, np.zeros_like(rows), seed)
    labels = torch.where(labels == dataset.num_classes, UNLABELLED, labels)
    return Held(latents, labels), dataset.class_names, str(dataset.index["source"]["fingerprint"])


def checked_count(num_images: int, available: int, path: str) -> int:
    """Return how many images to draw."""
    count = num_images or min(NUM_IMAGES, available)
    if not 2 <= count <= available:
        raise ValueError(
            f"num_images must be at least 2 and at most the {available} of {path}, got {count}"
        )
    return count


def known_labels(labels: Tensor, names: Sequence[str], model: RemixDiT, path: str) -> Tensor:
    """Return labels as a model numbers them; an image without one gets the null label."""
    classes = model.config.network.num_classes
    if not classes:
        return torch.zeros_like(labels)
    if names and len(names) != classes:
        raise ValueError(
            f"reference must be of the model's {classes} classes, got {len(names)} in {path}"
        )
    return torch.where(labels < 0, classes, labels)


def evaluate_intervals(
    model: RemixDiT,
    held: Held,
    config: IntervalConfig,
    rival: Rival | None = None,
    *,
    ranks: Ranks | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Generator[Progress, None, dict[str, Any]]:
    """Measure experts on intervals.

    Args:
        model: On its device, in its precision.
        held: n images.
        config: What to measure.
        rival: Another model of the same latents and prediction.
        ranks: Which of the processes this one is.
        seed: Of timesteps and noise.
        batch_size: Images at a time; does not change the result.

    Returns:
        The result as JSON values, the same on all processes.
    """
    ranks = ranks or Ranks()
    if rival is not None:
        check_rival(model, rival)
    plan = planned(model, held, config, rival, Draws(seed, batch_size))
    tables = plan.empty_tables()
    mine = list(plan.places())[ranks.rank :: ranks.num_ranks]
    for number, (table, place) in enumerate(mine):
        yield Progress("intervals", number, len(mine))
        tables[table][place] = plan.row(table, place)
    yield Progress("intervals", len(mine), len(mine))
    whole = {name: torch.from_numpy(table).to(model.device) for name, table in tables.items()}
    distributed.all_reduce(whole.values())  # what others measured is zero here, so this gathers
    if not all(bool(table.isfinite().all()) for table in whole.values()):
        raise ArithmeticError("losses must be finite, got nan or inf: the model has diverged")
    return summary(plan, {name: table.cpu().numpy() for name, table in whole.items()})


def check_rival(model: RemixDiT, rival: Rival) -> None:
    """Refuse models whose losses mean different things."""
    ours, theirs = model.config, rival.model.config
    for name, mine, other in (
        ("prediction_type", ours.prediction_type, theirs.prediction_type),
        ("num_train_timesteps", ours.num_train_timesteps, theirs.num_train_timesteps),
        ("latents", latent_shape(ours.network), latent_shape(theirs.network)),
        ("num_classes", ours.network.num_classes, theirs.network.num_classes),
    ):
        if mine != other:
            raise ValueError(f"against must have the {name} {mine}, got {other} in {rival.name}")


def latent_shape(network: DiTConfig) -> str:
    """Return the shape of what a network sees, in words."""
    return f"{network.in_channels} x {network.input_size} x {network.input_size}"


def chosen_intervals(model: RemixDiT, rival: Rival | None, config: IntervalConfig) -> Intervals:
    """Return the intervals to measure on: asked for, or those of the model with more experts."""
    models = [model, *([rival.model] if rival else [])]
    finest = max(models, key=lambda one: one.num_experts)
    count = config.num_intervals or (PLAIN_INTERVALS if finest.num_experts == 1 else 0)
    if not count:
        return finest.intervals
    if model.intervals.is_continuous:
        return Intervals.continuous(count)
    return Intervals.uniform(count, model.config.num_train_timesteps)


class Draws(NamedTuple):
    """What decides timesteps and noise, and how many images go at once."""

    seed: int
    batch_size: int


@dataclass(frozen=True)
class Plan:
    """Everything that is measured: tables of a row an interval."""

    models: dict[str, RemixDiT]
    """The one under test as "ours", and "against"."""
    held: Held
    intervals: Intervals
    strata: Intervals | None
    """Of the bound, if there is one."""
    matrix: Held | None
    """What every expert sees, if asked for."""
    draws: Draws

    def empty_tables(self) -> dict[str, np.ndarray]:
        """Return the tables, all zero: (I, n), (S, n) of the bound, (I, N) of the matrix."""
        count, num_images = self.intervals.num_experts, len(self.held.latents)
        tables = {f"losses {name}": np.zeros((count, num_images)) for name in self.models}
        if self.strata is not None:
            rows = self.strata.num_experts
            tables |= {f"bits {name}": np.zeros((rows, num_images)) for name in self.models}
        if self.matrix is not None:
            tables["matrix ours"] = np.zeros((count, self.models["ours"].num_experts))
        return tables

    def places(self) -> Iterator[tuple[str, int]]:
        """Yield every row to measure, as (table, number)."""
        for name, table in self.empty_tables().items():
            for place in range(len(table)):
                yield name, place

    def row(self, table: str, place: int) -> np.ndarray:
        """Measure one row."""
        what, name = table.split(" ")
        model, seed, batch_size = self.models[name], *self.draws
        if what == "bits":
            assert self.strata is not None
            return stratum_bits(model, self.held, self.strata, place, seed, batch_size)
        if what == "losses":
            return losses_on(model, self.held, self.intervals, place, None, seed, batch_size)[0]
        assert self.matrix is not None
        experts = range(model.num_experts)
        measured = losses_on(model, self.matrix, self.intervals, place, experts, seed, batch_size)
        return measured.mean(-1)


def planned(
    model: RemixDiT, held: Held, config: IntervalConfig, rival: Rival | None, draws: Draws
) -> Plan:
    """Return what is to be measured."""
    models = {"ours": model, **({"against": rival.model} if rival else {})}
    strata = None
    if not no_bound(model):
        strata = bound_strata(*(one.intervals for one in models.values()))
    count = config.matrix_images
    if count is None:
        count = MATRIX_IMAGES if model.num_experts <= MATRIX_EXPERTS else 0
    matrix = None
    if count and model.num_experts > 1:
        # Spread over all, which may come sorted by class.
        rows = np.unique(np.linspace(0, len(held.latents) - 1, count).round().astype(int))
        matrix = Held(held.latents[rows], held.class_labels[rows])
    return Plan(models, held, chosen_intervals(model, rival, config), strata, matrix, draws)


def summary(plan: Plan, tables: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the result as JSON values."""
    ours, theirs = tables["losses ours"], tables.get("losses against")
    boundaries = plan.intervals.boundaries
    shares = plan.intervals.masses
    result: dict[str, Any] = {
        "loss": compared(shares @ ours, None if theirs is None else shares @ theirs),
        "intervals": [
            {
                "from": boundaries[place],
                "to": boundaries[place + 1],
                "share": shares[place],
                **compared(row, None if theirs is None else theirs[place]),
            }
            for place, row in enumerate(ours)
        ],
        "bits_per_dim": bits_of(plan, tables),
        "matrix": matrix_of(plan, tables.get("matrix ours")),
        "machine": machine(plan.models["ours"].device),
    }
    return result


def compared(ours: np.ndarray, theirs: np.ndarray | None) -> dict[str, Any]:
    """Return the mean of values (n,) over images with its interval, beside another model's."""
    found = estimate(ours)
    if theirs is None:
        return found
    difference, base = estimate(ours - theirs), float(theirs.mean())
    relative = {
        "relative": difference["value"] / base,
        "relative_interval": sorted(end / base for end in difference["interval"]),
    }
    return {**found, "against": estimate(theirs), "difference": {**difference, **relative}}


def estimate(values: np.ndarray) -> dict[str, Any]:
    """Return the mean of values (n,), with the interval that drawing other images gives it."""
    found = Estimate(float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5))
    return {
        "value": found.value,
        "standard_error": found.standard_error,
        "interval": list(found.interval(CONFIDENCE)),
        "num_images": len(values),
    }


def bits_of(plan: Plan, tables: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the variational bound in bits a dimension, or why there is none."""
    model = plan.models["ours"]
    if plan.strata is None:
        return {"value": None, "left_out": no_bound(model)}
    prior = prior_bits(model, plan.held)
    totals = {name: tables[f"bits {name}"].sum(0) + prior for name in plan.models}  # (n,) each
    return {
        **compared(totals["ours"], totals.get("against")),
        "prior": float(prior.mean()),
        "first_timestep": float(tables["bits ours"][0].mean()),
        "variance": {
            name: "learned" if one.config.network.learn_sigma else "fixed, that of the process"
            for name, one in plan.models.items()
        },
    }


def matrix_of(plan: Plan, rows: np.ndarray | None) -> dict[str, Any]:
    """Return the loss of every expert on every interval, or why there is none."""
    experts = plan.models["ours"].num_experts
    if rows is None or plan.matrix is None:
        reason = "one expert" if experts == 1 else f"{experts} experts: ask by --matrix-images"
        return {"value": None, "left_out": reason}
    found: dict[str, Any] = {
        "value": rows.T.tolist(),  # (N, I)
        "num_images": len(plan.matrix.latents),
    }
    if plan.intervals == plan.models["ours"].intervals:
        best = rows.argmin(1) == np.arange(experts)
        found["owner_is_best"] = float(best.mean())
    return found
