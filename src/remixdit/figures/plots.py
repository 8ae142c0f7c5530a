"""Pictures of a mixture and its training: arrays in, matplotlib figures out.

Nothing here knows of models or touches pyplot's global state. Importing this module imports
matplotlib (half a second): `import remixdit` must not.

Shapes: N = num_experts, K = num_bases, L = tables of a per-block mixture, I = intervals, S = steps.
Interval n is [boundaries[n], boundaries[n + 1]): integer timesteps, or t in [0, 1]; n = 0 is the
least noisy.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from os import PathLike
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "coefficients_heatmap",
    "gradient_curve",
    "interval_labels",
    "loss_by_interval",
    "loss_curve",
    "loss_matrix",
    "save",
    "smoothed",
]

Floats = NDArray[np.float64]

# Okabe and Ito's eight colours, told apart with any kind of colour blindness; yellow comes last.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#F0E442")
LINES: tuple[Literal["-", "--", "-.", ":"], ...] = ("-", "--", "-.", ":")
MAX_WIDTH = 10  # inches: at 100 pixels an inch the width of a report
MAX_TICKS = 25  # more labels of intervals overlap, and more cells in a row have no room for numbers


def coefficients_heatmap(
    coefficients: ArrayLike, boundaries: ArrayLike, *, block: int | None = None
) -> Figure:
    """Draw which bases each expert is made of, as figure 4a of arXiv:2412.05628.

    Args:
        coefficients: (N, K), or (L, N, K) for one table a block, the last for what is mixed
            outside the blocks.
        boundaries: (N + 1,) ends of the intervals.
        block: Index of the table to draw; None for all L of them, one below the other.
    """
    tables = np.asarray(coefficients, dtype=float)
    tables = tables[None] if tables.ndim == 2 else tables  # (L, N, K)
    _check_table("coefficients", tables[0], boundaries, axis=0)
    length, experts, bases = tables.shape
    blocks = range(length) if block is None else [block]
    panel_height = 0.6 if len(blocks) > 1 else 0.5 + 0.4 * bases
    figure = _figure(_grid_width(experts), 1.2 + panel_height * len(blocks))
    panels = figure.subplots(len(blocks), 1, sharex=True, squeeze=False)[:, 0]
    low, high = min(0.0, tables.min()), max(1.0, tables.max())
    for axes, index in zip(panels, blocks, strict=True):
        table = tables[index].T  # (K, N)
        image = axes.imshow(table, aspect="auto", cmap="cividis", vmin=low, vmax=high)
        if len(blocks) == 1:
            axes.set_yticks(range(bases))
            axes.set_ylabel("basis")
            _write_cells(axes, image, table, "{:.2f}".format)
        else:
            axes.set_yticks([])
            name = "outside" if index == length - 1 else f"block {index}"
            axes.set_ylabel(name, rotation=0, ha="right", va="center")
    _interval_ticks(panels[-1], boundaries)
    figure.colorbar(image, ax=list(panels), label="coefficient", fraction=0.05, pad=0.02)
    return figure


def loss_by_interval(
    series: Mapping[str, ArrayLike],
    boundaries: ArrayLike,
    errors: Mapping[str, ArrayLike] | None = None,
    paired: Mapping[str, ArrayLike] | None = None,
) -> Figure:
    """Compare losses interval by interval, on a log axis and against the first series in per cent.

    Losses over intervals span orders of magnitude, and what experts gain is a few per cent of
    each: that is what the second panel is for.

    Args:
        series: Name -> (I,) mean losses; NaN leaves a gap.
        boundaries: (I + 1,) ends of the intervals.
        errors: Name -> (I,) standard errors of those means, drawn as bars.
        paired: Name -> (I,) standard errors of the paired differences from the first series, the
            bars of the second panel; by default it has each series' own.
    """
    losses = {name: np.asarray(values, dtype=float) for name, values in series.items()}
    bars = {name: np.asarray(values, dtype=float) for name, values in (errors or {}).items()}
    for name, values in (losses | bars).items():
        _check_table(name, values, boundaries, axis=0)
    first, baseline = next(iter(losses.items()))
    rows = min(len(losses), 2)
    figure = _figure(MAX_WIDTH, 1.3 + 2.4 * rows)
    panels = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    _draw_series(panels[0], losses, bars)
    panels[0].set_ylabel("loss")
    _log_axis(panels[0], np.concatenate(list(losses.values())))
    if rows == 2:
        changes = {name: 100 * (values / baseline - 1) for name, values in losses.items()}
        found = bars if paired is None else {n: np.asarray(bar) for n, bar in paired.items()}
        relative = {name: 100 * bar / abs(baseline) for name, bar in found.items()}
        _draw_series(panels[1], changes, relative)
        panels[1].set_ylabel(f"% above or below\n{_plain(first, 30)}")
    _interval_ticks(panels[-1], boundaries)
    _legend(figure, list(losses))
    return figure


def loss_matrix(matrix: ArrayLike, boundaries: ArrayLike) -> Figure:
    """Draw the loss of every expert on every interval, as figure 4c of arXiv:2412.05628.

    Columns differ by orders of magnitude, so a cell shows by how many per cent the expert is
    worse than the best one on that interval. A frame marks the best.

    Args:
        matrix: (N, I) positive losses of expert n on interval i.
        boundaries: (I + 1,) ends of the intervals.
    """
    losses = np.asarray(matrix, dtype=float)
    _check_table("matrix", losses, boundaries, axis=1)
    if not (np.isfinite(losses) & (losses > 0)).all():
        raise ValueError("matrix must hold positive losses: it is drawn as ratios to the best")
    excess = 100 * (losses / losses.min(axis=0) - 1)  # (N, I) per cent, 0 at the best
    experts, intervals = losses.shape
    figure = _figure(_grid_width(intervals), min(9.5, 1.7 + 0.36 * experts))
    axes = figure.subplots()
    # Linear to 1 %, logarithmic beyond: neighbours differ by 0.1 %, distant experts by 1000 %.
    top = max(1.0, excess.max())
    norm = AsinhNorm(linear_width=1, vmin=0, vmax=top)
    image = axes.imshow(excess, aspect="auto", cmap="viridis_r", norm=norm)
    _write_cells(axes, image, excess, _short_number)
    for interval, expert in enumerate(losses.argmin(axis=0)):
        corner = (interval - 0.5, expert - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=COLORS[1], linewidth=2))
    axes.set_yticks(range(0, experts, -(-experts // MAX_TICKS)))
    axes.set_ylabel("expert")
    _interval_ticks(axes, boundaries)
    bar = figure.colorbar(image, ax=axes, label="% above the best", fraction=0.05, pad=0.02)
    marks = [0, 0.3, 1, 3, 10, 30] if top < 50 else [0, *(10.0**power for power in range(9))]
    bar.ax.yaxis.set_major_locator(FixedLocator([mark for mark in marks if mark <= top]))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


def loss_curve(series: Mapping[str, tuple[ArrayLike, ArrayLike]], *, window: int = 0) -> Figure:
    """Draw losses over training: running means, and the losses themselves faint behind them.

    Args:
        series: Name -> (steps (S,), losses (S,)).
        window: Number of losses in a running mean; 0 for a fiftieth of the series.
    """
    figure = _figure(MAX_WIDTH, 4.5)
    axes = figure.subplots()
    for index, (steps, losses) in enumerate(series.values()):
        _draw_noisy(axes, np.asarray(steps), np.asarray(losses, dtype=float), window, index)
    _log_axis(axes, np.concatenate([np.asarray(losses) for _, losses in series.values()]))
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    _legend(figure, list(series))
    return figure


def gradient_curve(steps: ArrayLike, task: ArrayLike, prior: ArrayLike) -> Figure:
    """Draw the norms of the logits' two gradients: the larger one decides the coefficients.

    Args:
        steps: (S,) optimizer steps.
        task: (S,) norm of the gradient of the denoising loss.
        prior: (S,) norm of the gradient of the prior. A zero, as in its last step, cannot be
            drawn on a log axis and leaves a gap.
    """
    figure = _figure(MAX_WIDTH, 4)
    axes = figure.subplots()
    norms = np.array([task, prior], dtype=float)  # (2, S)
    norms[norms <= 0] = np.nan
    for index, values in enumerate(norms):
        _draw_noisy(axes, np.asarray(steps), values, 0, index)
    _log_axis(axes, norms)
    axes.set_xlabel("step")
    axes.set_ylabel("norm of the logits' gradient")
    _legend(figure, ["task", "prior"])
    return figure


def save(figure: Figure, path: str | PathLike[str]) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, format="png")


def interval_labels(boundaries: ArrayLike) -> list[str]:
    """Return "[0, 125)" for every interval; "[0.5, 1]" for the last one of a continuous t."""
    ends = np.asarray(boundaries)
    continuous = ends.dtype.kind == "f" and ends[-1] <= 1
    names = [f"{end:.0f}" for end in ends]
    if continuous:
        # As many digits as tell all ends apart: those of equal log-SNR width crowd at 0.
        spelled = [[f"{end:.{digits}g}" for end in ends] for digits in range(3, 17)]
        names = next(texts for texts in spelled if len(set(texts)) == len(ends))
    *labels, last = [f"[{low}, {high})" for low, high in pairwise(names)]
    return [*labels, last.replace(")", "]") if continuous else last]


def smoothed(values: ArrayLike, window: int) -> Floats:
    """Return the centred running mean, (S,) -> (S,): of fewer values at the ends, NaN at NaNs."""
    numbers = np.asarray(values, dtype=float)
    kept = np.isfinite(numbers)
    sums = np.append(0, np.cumsum(np.where(kept, numbers, 0)))
    counts = np.append(0, np.cumsum(kept))
    first = np.maximum(np.arange(len(numbers)) - window // 2, 0)
    last = np.minimum(np.arange(len(numbers)) + (window + 1) // 2, len(numbers))
    means = (sums[last] - sums[first]) / np.maximum(counts[last] - counts[first], 1)
    return np.where(kept, means, np.nan)


# ------------------------------------------------------------------------------ parts


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _grid_width(columns: int) -> float:
    """Return the inches that leave room for numbers in the cells."""
    return float(np.clip(2.6 + 0.8 * columns, 5, MAX_WIDTH))


def _write_cells(
    axes: Axes, image: AxesImage, values: Floats, text: Callable[[float], str]
) -> None:
    """Write the numbers of a (rows, columns) image into its cells, if there is room."""
    if max(values.shape) > MAX_TICKS:
        return
    dark = image.to_rgba(values)[..., :3] @ (0.299, 0.587, 0.114) < 0.5  # (rows, columns)
    for (row, column), value in np.ndenumerate(values):
        color = "white" if dark[row, column] else "black"
        axes.text(column, row, text(value), ha="center", va="center", color=color, fontsize=9)


def _short_number(value: float) -> str:
    if value < 9.95:
        return f"{value:.1f}" if value else "0"
    return f"{value:.0f}" if value < 9999.5 else f"{value / 1000:.0f}k"


def _interval_ticks(axes: Axes, boundaries: ArrayLike) -> None:
    labels = interval_labels(boundaries)
    every = -(-len(labels) // MAX_TICKS)
    axes.set_xticks(range(0, len(labels), every), labels[::every])
    if sum(len(label) + 2 for label in labels) > 110:
        for text in axes.get_xticklabels():
            text.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_xlabel("interval of timesteps, least noisy first")


def _draw_series(axes: Axes, series: Mapping[str, Floats], bars: Mapping[str, Floats]) -> None:
    for index, (name, values) in enumerate(series.items()):
        color, line = _look(index)
        places = np.arange(len(values))
        marker = "o" if len(values) <= MAX_TICKS else ""
        axes.plot(places, values, color=color, linestyle=line, marker=marker, markersize=4)
        if name in bars:
            axes.errorbar(places, values, yerr=bars[name], fmt="none", ecolor=color, alpha=0.6)
    axes.grid(axis="y", alpha=0.3)


def _draw_noisy(
    axes: Axes, steps: NDArray[np.generic], values: Floats, window: int, index: int
) -> None:
    color, line = _look(index)
    means = smoothed(values, window or -(-len(values) // 50))
    marker = "o" if len(values) == 1 else ""
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8, zorder=1)
    axes.plot(steps, means, color=color, linestyle=line, linewidth=2, marker=marker)


def _log_axis(axes: Axes, values: Floats) -> None:
    """Make the y axis logarithmic, with plain numbers on it, where all values are positive."""
    axes.grid(axis="y", alpha=0.3)
    finite = values[np.isfinite(values)]
    if not len(finite) or finite.min() <= 0:
        return
    axes.set_yscale("log")
    span = finite.max() / finite.min()
    marks = (1, 2, 5) if span < 100 else (1, 3) if span < 10000 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=marks) if span > 3 else MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, names: Sequence[str]) -> None:
    """Name the series above the panels, where no curve can run through the names."""
    looks = [_look(index) for index in range(len(names))]
    handles = [Line2D([], [], color=color, linestyle=line, linewidth=2) for color, line in looks]
    shown = [_plain(name, 60) for name in names]
    columns = max(1, 110 // (max(map(len, shown)) + 8))
    figure.legend(handles, shown, loc="outside upper center", ncols=columns, frameon=False)


def _look(index: int) -> tuple[str, Literal["-", "--", "-.", ":"]]:
    return COLORS[index % len(COLORS)], LINES[index % len(LINES)]


def _plain(text: str, length: int) -> str:
    """Cut off a long text, and keep matplotlib from reading a dollar sign as a formula."""
    short = text if len(text) <= length else text[: length - 1] + "…"
    return short.replace("$", r"\$")


def _check_table(name: str, table: Floats, boundaries: ArrayLike, axis: int) -> None:
    """Refuse a table whose `axis` does not run over the intervals."""
    if 0 in table.shape or np.shape(boundaries) != (table.shape[axis] + 1,):
        raise ValueError(
            f"{name} of shape {table.shape} needs {table.shape[axis] + 1} boundaries, "
            f"got shape {np.shape(boundaries)}"
        )
