"""Figures of losses on held-out images, from the result of `evaluate_intervals`."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from remixdit.figures.plots import loss_by_interval, loss_matrix

__all__ = ["interval_figure", "matrix_figure"]

Facts = Mapping[str, Any]


def interval_figure(result: Facts, name: str, against: str | None = None) -> Figure:
    """Draw the loss of each interval with its standard error, beside the other model's.

    Both models are measured on the same images and noise, so the difference in per cent has the
    standard error of the paired difference, which is far smaller than that of either loss.

    Args:
        result: That of `evaluate_intervals`.
        name: What to call the model.
        against: What to call the other model; it comes first, as the one compared with.
    """
    rows = result["intervals"]
    found = {} if against is None else {against: [row["against"] for row in rows]}
    found[name] = rows
    means, errors = (
        {model: [row[what] for row in of_model] for model, of_model in found.items()}
        for what in ("value", "standard_error")
    )
    title = f"{name}: loss on held-out images, by interval"
    if against is None:
        return loss_by_interval(means, boundaries_in(result), errors, title=title)
    paired = {name: [row["difference"]["standard_error"] for row in rows]}
    return loss_by_interval(means, boundaries_in(result), errors, paired, title=title)


def matrix_figure(result: Facts, name: str) -> Figure:
    """Draw every expert of a model on every interval; the result must hold a matrix."""
    title = f"{name}: every expert on every interval"
    return loss_matrix(result["matrix"]["value"], boundaries_in(result), title=title)


def boundaries_in(result: Facts) -> list[float]:
    """Return the ends of the intervals."""
    rows = result["intervals"]
    return [*(row["from"] for row in rows), rows[-1]["to"]]
