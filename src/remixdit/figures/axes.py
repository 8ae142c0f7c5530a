"""What all figures share: titles, notes, legends, ticks and colours.

Shapes: I intervals. Interval n is [boundaries[n], boundaries[n + 1]): integer timesteps, or t in
[0, 1].
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from textwrap import fill
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from remixdit.figures.fonts import families, with_letters

__all__ = [
    "COLORS",
    "LINES",
    "MAX_TICKS",
    "interval_labels",
    "interval_ticks",
    "legend",
    "log_axis",
    "look",
    "new_figure",
    "plain",
    "sparse",
    "write_cells",
]

Floats = NDArray[np.float64]

# Okabe and Ito's eight colours, told apart with any kind of colour blindness; yellow comes last.
# In print without colours the lines differ by their dashes.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#F0E442")
LINES: tuple[Literal["-", "--", "-.", ":"], ...] = ("-", "--", "-.", ":")
MAX_TICKS = 25  # more cells in a row have no room for numbers
MAX_SPARSE = 12  # labels of an axis with more cells than that
LABELS = 110  # letters of labels beside each other


def new_figure(width: float, height: float, title: str = "", note: str = "") -> Figure:
    """Return an empty figure.

    Args:
        width: Inches.
        height: Inches, without title and note.
        title: One line above.
        note: Explanation of the marks, in small letters below.
    """
    lines = fill(note, int(14 * width))
    rows = lines.count("\n") + 1 if note else 0
    size = (width, height + 0.4 * bool(title) + 0.2 * rows)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    if title:
        shown = plain(title, int(10 * width))
        figure.suptitle(shown, x=0.01, ha="left", fontsize=12, fontfamily=families(title))
    if note:
        figure.supxlabel(lines, x=0.01, ha="left", fontsize=9, color="0.35")
    return figure


def look(index: int) -> tuple[str, Literal["-", "--", "-.", ":"]]:
    """Return colour and dashes of a curve."""
    return COLORS[index % len(COLORS)], LINES[index % len(LINES)]


def legend(axes: Axes, names: Sequence[str]) -> None:
    """Name the curves above the panel, where none of them can run through the names."""
    looks = [look(index) for index in range(len(names))]
    handles = [Line2D([], [], color=color, linestyle=line, linewidth=2) for color, line in looks]
    shown = [plain(name, 60) for name in names]
    columns = max(1, LABELS // (max(map(len, shown)) + 8))
    box = axes.legend(
        handles, shown, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False
    )
    for name, text in zip(names, box.get_texts(), strict=True):
        text.set_fontfamily(families(name))


def plain(text: str, length: int) -> str:
    """Cut off a long text, and keep matplotlib from reading a dollar sign as a formula."""
    short = text if len(text) <= length else text[: length - 1] + "…"
    return with_letters(short).replace("$", r"\$")


def interval_labels(boundaries: ArrayLike) -> list[str]:
    """Return "[0, 125)" for every interval; "[0.5, 1]" for the last one of a continuous t."""
    ends = np.asarray(boundaries)
    *labels, last = [f"[{low}, {high})" for low, high in pairwise(_end_labels(ends))]
    return [*labels, last.replace(")", "]") if _is_continuous(ends) else last]


def interval_ticks(axes: Axes, boundaries: ArrayLike) -> None:
    """Label a cell for each interval; of many, only where some of them begin."""
    labels = interval_labels(boundaries)
    count = len(labels)
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_xlabel("interval of timesteps, least noisy first")
    if count > MAX_TICKS:
        shown = sparse(count + 1)
        ends = _end_labels(np.asarray(boundaries))
        axes.set_xticks([n - 0.5 for n in shown], [ends[n] for n in shown])
        axes.set_xlabel(
            f"timestep at which an interval begins ({count} intervals, least noisy first)"
        )
        return
    axes.set_xticks(range(count), labels)
    if sum(len(label) + 2 for label in labels) > LABELS:
        for text in axes.get_xticklabels():
            text.set(rotation=45, ha="right", rotation_mode="anchor")


def sparse(count: int) -> range:
    """Return which of `count` places in a row are labelled: round numbers, 12 or so at most."""
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    return range(0, count, next(step for step in steps if -(-count // step) <= MAX_SPARSE))


def _is_continuous(ends: NDArray[np.generic]) -> bool:
    return ends.dtype.kind == "f" and bool(ends[-1] <= 1)


def _end_labels(ends: NDArray[np.generic]) -> list[str]:
    """Return the ends of the intervals as texts."""
    if not _is_continuous(ends):
        return [f"{end:.0f}" for end in ends]
    # As many digits as tell all ends apart: those of equal log-SNR width crowd at 0.
    spelled = [[f"{end:.{digits}g}" for end in ends] for digits in range(3, 17)]
    return next(texts for texts in spelled if len(set(texts)) == len(ends))


def write_cells(axes: Axes, image: AxesImage, values: Floats, text: Callable[[float], str]) -> None:
    """Write the numbers of a (rows, columns) image into its cells, if there is room."""
    if max(values.shape) > MAX_TICKS:
        return
    dark = image.to_rgba(values)[..., :3] @ (0.299, 0.587, 0.114) < 0.5  # (rows, columns)
    for (row, column), value in np.ndenumerate(values):
        color = "white" if dark[row, column] else "black"
        axes.text(column, row, text(value), ha="center", va="center", color=color, fontsize=9)


def log_axis(axes: Axes, values: Floats) -> None:
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
