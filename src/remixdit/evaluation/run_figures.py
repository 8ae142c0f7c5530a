"""Figures of a training run, from its metrics and its newest weights."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from remixdit.figures.animation import Animation
from remixdit.figures.plots import (
    coefficients_heatmap,
    gradient_curve,
    loss_by_interval,
    loss_curve,
)
from remixdit.model.describe import describe
from remixdit.model.loading import find_model, read_while_training
from remixdit.training.run import COEFFICIENTS_FILE, read_metrics, stated_settings

__all__ = ["run_animation", "run_figures"]

Rows = Sequence[Mapping[str, Any]]


def run_figures(run_dir: Path) -> Iterator[tuple[str, Figure]]:
    """Yield (name, figure) for everything that a run has logged.

    Args:
        run_dir: Directory of a run, finished or not. Without a checkpoint only the loss curve can
            be drawn.
    """
    rows, name = read_metrics(run_dir), run_dir.absolute().name
    if not rows:
        meant = run_dir.absolute().parent
        hint = f"; its run is {meant}" if (meant / "metrics.jsonl").is_file() else ""
        raise ValueError(f"run must have lines in metrics.jsonl, got {run_dir}{hint}")
    steps = [row["step"] for row in rows]
    curve = {"training": (steps, [row["loss"] for row in rows])}
    yield "loss", loss_curve(curve, title=f"{name}: training loss")
    try:
        find_model(run_dir)
    except ValueError:
        return  # no checkpoint yet
    facts = read_while_training(run_dir, lambda: describe(run_dir))
    title = f"{name}: training loss by interval, at the start and at the end"
    found = interval_losses(rows), logged_boundaries(run_dir, facts)
    yield "loss-by-interval", loss_by_interval(*found, title=title)
    if facts["num_bases"] > 1:
        title = coefficients_title(name, facts)
        heat_map = coefficients_heatmap(facts["coefficients"], facts["boundaries"], title=title)
        yield "coefficients", heat_map
    if facts["num_bases"] > 1 and facts["coefficient_kind"] != "one_hot":
        task, prior = ([row[f"logits_{of}_grad"] for row in rows] for of in ("task", "prior"))
        title = f"{name}: gradients of the logits"
        yield "gradients", gradient_curve(steps, task, prior, title=title)


def run_animation(run_dir: Path) -> Animation | None:
    """Return the coefficients over a run, None of a run that has recorded fewer than two tables."""
    rows = read_metrics(run_dir, COEFFICIENTS_FILE)
    try:
        find_model(run_dir)
    except ValueError:
        return None
    if len(rows) < 2:
        return None
    facts = describe(run_dir)
    return Animation(
        np.array([row["coefficients"] for row in rows]),
        [row["step"] for row in rows],
        facts["boundaries"],
        coefficients_title(run_dir.absolute().name, facts),
    )


def coefficients_title(name: str, facts: Mapping[str, Any]) -> str:
    """Return the title of the coefficients of a run."""
    return f"{name}: {facts['num_experts']} experts mixed from {facts['num_bases']} bases"


def interval_losses(rows: Rows) -> dict[str, np.ndarray]:
    """Return the mean losses (I,) over the first and the last fifth of a run."""
    losses = np.array([row["loss_by_interval"] for row in rows], dtype=float)  # (S, I), None: NaN
    size = max(1, len(losses) // 5)
    last = {f"steps {span(rows[-size:])}": mean_over_steps(losses[-size:])}
    if len(losses) == 1:
        return last
    return {f"steps {span(rows[:size])}": mean_over_steps(losses[:size]), **last}


def mean_over_steps(losses: np.ndarray) -> np.ndarray:
    """Return the means (I,) of (S, I) without the NaN; NaN where nothing was drawn."""
    seen = np.isfinite(losses)
    sums = np.where(seen, losses, 0).sum(0)
    return np.where(seen.any(0), sums / np.maximum(seen.sum(0), 1), np.nan)


def span(rows: Rows) -> str:
    """Return the steps that lines of metrics end at."""
    first, last = rows[0]["step"], rows[-1]["step"]
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def logged_boundaries(run_dir: Path, facts: Mapping[str, Any]) -> Sequence[float]:
    """Return the boundaries of the intervals of logged losses: those of experts, or strata."""
    stated = stated_settings(run_dir) or {}
    return list(stated.get("boundaries", facts["boundaries"]))
