"""Experts against intervals on held-out images: losses, the matrix, bits, and a paired rival.

Every model sees the same images, timesteps and noise, so that a difference of losses is one of
weights. Errors are over the images, as a sample of all images. Processes share the intervals, so
their number changes nothing.

Shapes: n held-out images, I intervals, N experts.
"""

from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from remixdit import distributed
from remixdit.diffusion.intervals import Intervals
from remixdit.distributed.ranks import Ranks
from remixdit.evaluation.bits import bound_strata, prior_bits, require_bound, stratum_bits
from remixdit.evaluation.held_out import HeldOut
from remixdit.evaluation.left_out import LeftOut, measured
from remixdit.evaluation.losses import losses_on
from remixdit.evaluation.metrics import Estimate
from remixdit.machine import machine
from remixdit.model.match import match, side_of
from remixdit.model.model import RemixDiT
from remixdit.progress import Progress
from remixdit.training.run import stated_settings

__all__ = ["LossesConfig", "Rival", "evaluate_intervals", "stated_strata"]

PLAIN_INTERVALS = 10  # of a model with one expert
MATRIX_IMAGES = 250
MATRIX_EXPERTS = 100  # above, the matrix must be asked for
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class LossesConfig:
    """How experts are measured on intervals."""

    num_intervals: int = 0
    """Number of equal intervals; 0 for the experts' own (a plain DiT: training strata, or 10)."""
    matrix_images: int | None = None
    """Number of images of the matrix. By default 250, or none for more than 100 experts."""
    seed: int = 0
    """Seed for timesteps and noise, and for the choice of images."""
    batch_size: int = 64
    """Number of images in one forward pass. It does not change the result."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name, least in (("num_intervals", 0), ("matrix_images", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


class Rival(NamedTuple):
    """The other model."""

    name: str
    model: RemixDiT


def evaluate_intervals(
    model: RemixDiT,
    held: HeldOut,
    config: LossesConfig,
    rival: Rival | None = None,
    *,
    strata: Intervals | None = None,
    ranks: Ranks | None = None,
) -> Generator[Progress, None, dict[str, Any]]:
    """Measure experts on intervals.

    Args:
        model: On its device, in its precision.
        held: Held-out images, n of them.
        config: How to measure.
        rival: Another model of the same latents and prediction.
        strata: Intervals for a plain DiT, see `stated_strata`.
        ranks: The place of this process among all.

    Returns:
        The result as JSON values, the same on all processes.
    """
    ranks = ranks or Ranks()
    sets = {"ours": held}
    if rival is not None:
        sets["against"] = rival_labels(model, rival, held)
    intervals = chosen_intervals(model, rival, strata, config.num_intervals)
    plan = planned(model, sets, config, rival, intervals)
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


def rival_labels(model: RemixDiT, rival: Rival, held: HeldOut) -> HeldOut:
    """Return held-out images with labels as the rival numbers them.

    Raises:
        ValueError: The losses of the two models mean different things.
    """
    ours = side_of("the model", model.config)
    theirs = side_of(f"--against {rival.name}", rival.model.config)
    numbers = torch.tensor(match(ours, theirs), dtype=torch.int64)  # ours, of each of the rival's
    if not len(numbers):
        return held
    labels = torch.cat([numbers.argsort(), torch.tensor([ours.num_classes])])  # and null
    return HeldOut(held.latents, labels[held.class_labels])


def stated_strata(run_dir: Path) -> Intervals | None:
    """Return the intervals over which the timesteps of a run were spread, if it is a run."""
    stated = stated_settings(run_dir) or {}
    boundaries = stated.get("boundaries") or ()
    return Intervals(tuple(boundaries)) if len(boundaries) > 2 else None


def chosen_intervals(
    model: RemixDiT, rival: Rival | None, strata: Intervals | None, num_intervals: int
) -> Intervals:
    """Return the intervals to measure on.

    In this order: as many as were asked for, those of the model with more experts, the strata, 10.
    """
    models = [model, *([rival.model] if rival else [])]
    finest = max(models, key=lambda one: one.num_experts)
    if not num_intervals and finest.num_experts > 1:
        return finest.intervals
    if not num_intervals and strata is not None:
        return strata
    count = num_intervals or PLAIN_INTERVALS
    if model.intervals.is_continuous:
        return Intervals.continuous(count)
    return Intervals.uniform(count, model.config.num_train_timesteps)


@dataclass(frozen=True)
class Plan:
    """Everything that is measured: tables of a row an interval."""

    models: dict[str, RemixDiT]
    """The model under test as "ours", and the other one as "against"."""
    held: dict[str, HeldOut]
    """The same images for each model, with labels as it numbers them."""
    intervals: Intervals
    strata: Intervals | None
    """Strata of the bound, if the model has one."""
    matrix: HeldOut | None
    """Images that every expert is measured on, if a matrix was asked for."""
    config: LossesConfig

    def empty_tables(self) -> dict[str, np.ndarray]:
        """Return the tables, all zero: (I, n), (S, n) of the bound, (I, N) of the matrix."""
        count, num_images = self.intervals.num_experts, len(self.held["ours"].latents)
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
        model, held = self.models[name], self.held[name]
        seed, batch_size = self.config.seed, self.config.batch_size
        if what == "bits":
            assert self.strata is not None
            return stratum_bits(model, held, self.strata, place, seed, batch_size)
        if what == "losses":
            return losses_on(model, held, self.intervals, place, None, seed, batch_size)[0]
        assert self.matrix is not None
        experts = range(model.num_experts)
        measured = losses_on(model, self.matrix, self.intervals, place, experts, seed, batch_size)
        return measured.mean(-1)


def planned(
    model: RemixDiT,
    sets: dict[str, HeldOut],
    config: LossesConfig,
    rival: Rival | None,
    intervals: Intervals,
) -> Plan:
    """Return the plan of all measurements."""
    models = {"ours": model, **({"against": rival.model} if rival else {})}
    strata = None
    with suppress(LeftOut):  # the result says why
        require_bound(model)
        strata = bound_strata(*(one.intervals for one in models.values()))
    count = config.matrix_images
    if count is None:
        count = MATRIX_IMAGES if model.num_experts <= MATRIX_EXPERTS else 0
    matrix, held = None, sets["ours"]
    if count and model.num_experts > 1:
        # Spread over all, which may come sorted by class.
        rows = np.unique(np.linspace(0, len(held.latents) - 1, count).round().astype(int))
        matrix = HeldOut(held.latents[rows], held.class_labels[rows])
    return Plan(models, sets, intervals, strata, matrix, config)


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
        "bits_per_dim": measured(lambda: bits(plan, tables)),
        "matrix": measured(lambda: matrix(plan, tables.get("matrix ours"))),
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


def bits(plan: Plan, tables: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the variational bound in bits a dimension."""
    model = plan.models["ours"]
    require_bound(model)
    prior = prior_bits(model, plan.held["ours"])
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


def matrix(plan: Plan, rows: np.ndarray | None) -> dict[str, Any]:
    """Return the loss of every expert on every interval."""
    experts = plan.models["ours"].num_experts
    if rows is None or plan.matrix is None:
        raise LeftOut(
            "one expert" if experts == 1 else f"{experts} experts: ask by --matrix-images"
        )
    found: dict[str, Any] = {
        "value": rows.T.tolist(),  # (N, I)
        "num_images": len(plan.matrix.latents),
    }
    if plan.intervals == plan.models["ours"].intervals:
        best = rows.argmin(1) == np.arange(experts)
        found["owner_is_best"] = float(best.mean())
    return found
