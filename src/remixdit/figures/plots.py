"""Pictures of a mixture and its training: arrays in, matplotlib figures out.

Nothing here knows of models or touches pyplot's global state. Importing this module imports
matplotlib (half a second): `import remixdit` must not.

Shapes: N = num_experts, K = num_bases, L = tables of a per-block mixture, I = intervals, S = steps.
Interval n is [boundaries[n], boundaries[n + 1]): integer timesteps, or t in [0, 1]; n = 0 is the
least noisy.
"""

from collections.abc import Mapping
from os import PathLike

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

from remixdit.figures.axes import (
    COLORS,
    LINES,
    MAX_TICKS,
    interval_ticks,
    legend,
    log_axis,
    look,
    new_figure,
    plain,
    sparse,
    write_cells,
)

__all__ = [
    "COLORS",
    "LINES",
    "coefficients_heatmap",
    "gradient_curve",
    "loss_by_interval",
    "loss_curve",
    "loss_matrix",
    "save",
    "smoothed",
]

Floats = NDArray[np.float64]

MAX_WIDTH = 10  # inches: at 100 pixels an inch the width of a report
TABLE_NOTE = (
    "Column: an expert, which owns an interval. Row: a basis. "
    "Colour: the share of the basis in the expert."
)
BLOCKS_NOTE = (
    "A table for each block. Column: an expert, which owns an interval. Row: a basis, the first "
    "on top. Colour: the share of the basis in the expert."
)
CURVE_NOTE = "Bold: the running mean. Faint: each line of the log, a mean over its steps."
MATRIX_NOTE = (
    "Cell: the loss of an expert on an interval, in per cent above the best expert there. "
    "Frame: the best."
)


def coefficients_heatmap(
    coefficients: ArrayLike, boundaries: ArrayLike, *, block: int | None = None, title: str = ""
) -> Figure:
    """Draw which bases each expert is made of, as figure 4a of arXiv:2412.05628.

    Args:
        coefficients: (N, K), or (L, N, K) for one table a block, the last for what is mixed
            outside the blocks.
        boundaries: (N + 1,) ends of the intervals.
        block: Index of the table to draw; None for all L of them, one below the other.
        title: Title of the figure.
    """
    tables = np.asarray(coefficients, dtype=float)
    tables = tables[None] if tables.ndim == 2 else tables  # (L, N, K)
    _check_table("coefficients", tables[0], boundaries, axis=0)
    length, experts, bases = tables.shape
    blocks = range(length) if block is None else [block]
    panel_height = 0.6 if len(blocks) > 1 else 0.5 + 0.4 * bases
    note = TABLE_NOTE if len(blocks) == 1 else BLOCKS_NOTE
    height = 1.2 + panel_height * len(blocks)
    figure = new_figure(_grid_width(experts), height, title, note)
    panels = figure.subplots(len(blocks), 1, sharex=True, squeeze=False)[:, 0]
    low, high = min(0.0, tables.min()), max(1.0, tables.max())
    for axes, index in zip(panels, blocks, strict=True):
        table = tables[index].T  # (K, N)
        image = axes.imshow(table, aspect="auto", cmap="cividis", vmin=low, vmax=high)
        if len(blocks) == 1:
            axes.set_yticks(range(bases))
            axes.set_ylabel("basis")
            write_cells(axes, image, table, "{:.2f}".format)
        else:
            axes.set_yticks([])
            name = "outside" if index == length - 1 else f"block {index}"
            axes.set_ylabel(name, rotation=0, ha="right", va="center")
    interval_ticks(panels[-1], boundaries)
    figure.colorbar(image, ax=list(panels), label="coefficient", fraction=0.05, pad=0.02)
    return figure


def loss_by_interval(
    series: Mapping[str, ArrayLike],
    boundaries: ArrayLike,
    errors: Mapping[str, ArrayLike] | None = None,
    paired: Mapping[str, ArrayLike] | None = None,
    *,
    title: str = "",
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
        title: Title of the figure.
    """
    losses = {name: np.asarray(values, dtype=float) for name, values in series.items()}
    bars = {name: np.asarray(values, dtype=float) for name, values in (errors or {}).items()}
    for name, values in (losses | bars).items():
        _check_table(name, values, boundaries, axis=0)
    first, baseline = next(iter(losses.items()))
    rows = min(len(losses), 2)
    note = "Bar: the standard error." if bars else ""
    figure = new_figure(MAX_WIDTH, 1.3 + 2.4 * rows, title, note)
    panels = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    _draw_series(panels[0], losses, bars)
    panels[0].set_ylabel("loss")
    log_axis(panels[0], np.concatenate(list(losses.values())))
    if rows == 2:
        changes = {name: 100 * (values / baseline - 1) for name, values in losses.items()}
        found = bars if paired is None else {n: np.asarray(bar) for n, bar in paired.items()}
        relative = {name: 100 * bar / abs(baseline) for name, bar in found.items()}
        _draw_series(panels[1], changes, relative)
        panels[1].set_ylabel(f"% above or below\n{plain(first, 30)}")
    interval_ticks(panels[-1], boundaries)
    legend(panels[0], list(losses))
    return figure


def loss_matrix(matrix: ArrayLike, boundaries: ArrayLike, *, title: str = "") -> Figure:
    """Draw the loss of every expert on every interval, as figure 4c of arXiv:2412.05628.

    Columns differ by orders of magnitude, so a cell shows by how many per cent the expert is
    worse than the best one on that interval. A frame marks the best.

    Args:
        matrix: (N, I) positive losses of expert n on interval i.
        boundaries: (I + 1,) ends of the intervals.
        title: Title of the figure.
    """
    losses = np.asarray(matrix, dtype=float)
    _check_table("matrix", losses, boundaries, axis=1)
    if not (np.isfinite(losses) & (losses > 0)).all():
        raise ValueError("matrix must hold positive losses: it is drawn as ratios to the best")
    excess = 100 * (losses / losses.min(axis=0) - 1)  # (N, I) per cent, 0 at the best
    experts, intervals = losses.shape
    height = min(9.5, 1.7 + 0.36 * experts)
    figure = new_figure(_grid_width(intervals), height, title, MATRIX_NOTE)
    axes = figure.subplots()
    # Linear to 1 %, logarithmic beyond: neighbours differ by 0.1 %, distant experts by 1000 %.
    top = max(1.0, excess.max())
    norm = AsinhNorm(linear_width=1, vmin=0, vmax=top)
    image = axes.imshow(excess, aspect="auto", cmap="viridis_r", norm=norm)
    write_cells(axes, image, excess, _short_number)
    width = 2 if intervals <= MAX_TICKS else 1
    for interval, expert in enumerate(losses.argmin(axis=0)):
        corner = (interval - 0.5, expert - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=COLORS[1], linewidth=width))
    axes.set_yticks(range(experts) if experts <= MAX_TICKS else sparse(experts))
    axes.set_ylabel("expert")
    interval_ticks(axes, boundaries)
    bar = figure.colorbar(image, ax=axes, label="% above the best", fraction=0.05, pad=0.02)
    marks = [0, 0.3, 1, 3, 10, 30] if top < 50 else [0, *(10.0**power for power in range(9))]
    bar.ax.yaxis.set_major_locator(FixedLocator([mark for mark in marks if mark <= top]))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


def loss_curve(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]], *, window: int = 0, title: str = ""
) -> Figure:
    """Draw losses over training: running means, and the losses themselves faint behind them.

    Args:
        series: Name -> (steps (S,), losses (S,)).
        window: Number of losses in a running mean; 0 for a fiftieth of the series.
        title: Title of the figure.
    """
    figure = new_figure(MAX_WIDTH, 4.5, title, CURVE_NOTE)
    axes = figure.subplots()
    for index, (steps, losses) in enumerate(series.values()):
        _draw_noisy(axes, np.asarray(steps), np.asarray(losses, dtype=float), window, index)
    log_axis(axes, np.concatenate([np.asarray(losses) for _, losses in series.values()]))
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    legend(axes, list(series))
    return figure


def gradient_curve(
    steps: ArrayLike, task: ArrayLike, prior: ArrayLike, *, title: str = ""
) -> Figure:
    """Draw the norms of the logits' two gradients: the larger one decides the coefficients.

    Args:
        steps: (S,) optimizer steps.
        task: (S,) norm of the gradient of the denoising loss.
        prior: (S,) norm of the gradient of the prior. A zero, as in its last step, cannot be
            drawn on a log axis and leaves a gap.
        title: Title of the figure.
    """
    figure = new_figure(MAX_WIDTH, 4, title, CURVE_NOTE)
    axes = figure.subplots()
    norms = np.array([task, prior], dtype=float)  # (2, S)
    norms[norms <= 0] = np.nan
    for index, values in enumerate(norms):
        _draw_noisy(axes, np.asarray(steps), values, 0, index)
    log_axis(axes, norms)
    axes.set_xlabel("step")
    axes.set_ylabel("norm of the logits' gradient")
    legend(axes, ["of the denoising loss", "of the prior"])
    return figure


def save(figure: Figure, path: str | PathLike[str], kind: str = "png") -> None:
    """Write a figure as "png", "svg" or "pdf"; the same figure gives the same file.

    Fonts of a PDF are embedded as TrueType, which publishers ask for.
    """
    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "remixdit"}):
        figure.savefig(path, format=kind, metadata=dated.get(kind))


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


def _grid_width(columns: int) -> float:
    """Return the inches that leave room for numbers in the cells."""
    return float(np.clip(2.6 + 0.8 * columns, 5, MAX_WIDTH))


def _short_number(value: float) -> str:
    if value < 9.95:
        return f"{value:.1f}" if value else "0"
    return f"{value:.0f}" if value < 9999.5 else f"{value / 1000:.0f}k"


def _draw_series(axes: Axes, series: Mapping[str, Floats], bars: Mapping[str, Floats]) -> None:
    for index, (name, values) in enumerate(series.items()):
        color, line = look(index)
        places = np.arange(len(values))
        marker = "o" if len(values) <= MAX_TICKS else ""
        axes.plot(places, values, color=color, linestyle=line, marker=marker, markersize=4)
        if name in bars:
            axes.errorbar(places, values, yerr=bars[name], fmt="none", ecolor=color, alpha=0.6)
    axes.grid(axis="y", alpha=0.3)


def _draw_noisy(
    axes: Axes, steps: NDArray[np.generic], values: Floats, window: int, index: int
) -> None:
    color, line = look(index)
    means = smoothed(values, window or -(-len(values) // 50))
    marker = "o" if len(values) == 1 else ""
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8, zorder=1)
    axes.plot(steps, means, color=color, linestyle=line, linewidth=2, marker=marker)


def _check_table(name: str, table: Floats, boundaries: ArrayLike, axis: int) -> None:
    """Refuse a table whose `axis` does not run over the intervals."""
    if 0 in table.shape or np.shape(boundaries) != (table.shape[axis] + 1,):
        raise ValueError(
            f"{name} of shape {table.shape} needs {table.shape[axis] + 1} boundaries, "
            f"got shape {np.shape(boundaries)}"
        )
