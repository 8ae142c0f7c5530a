"""A leaderboard at equal time: the table and figures of a study whose budget is in seconds.

Runs of a seed see the same images in the same order, and all cells draw the same noise, so every
difference is paired: by seed, and for the kernel distance also image by image. Its interval holds
both errors, that over seeds and that over images.

Shapes: S seeds, B real images, B' samples.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from remixdit.figures import plots
from remixdit.figures.html import Table
from remixdit.study.paired import Paired, as_text, mean_of, paired, paired_kernels
from remixdit.study.variants import START

__all__ = ["NOTE", "at_equal_time", "board_figure", "board_table", "load_kernels"]

Result = dict[str, Any]
Value = Callable[[dict[str, Any]], float | None]
Groups = Mapping[str, Sequence[Result]]
# (variant, seed) -> "real" (B,) and "fake" (B',) shifts of the kernel distance
Kernels = Mapping[tuple[str, int], Mapping[str, np.ndarray]]

WORSE = 1.1  # times the start: what is above has no place in a figure of small differences

CAPTION = (
    "Every variant was trained for the seconds that the stratified plain DiT takes for the budget, "
    "by the medians of steps that took turns. Loss: mean over 40 intervals of timesteps of the "
    "squared error on held-out images; parts: the least noisy quarter of the fall of the log-SNR, "
    "the middle, the noisiest quarter. Per cent: the paired difference with its 95 % interval over "
    "seeds, for KID over seeds and images, and the seeds in which it is lower."
)

NOTE = (
    "Lines: mean over the seeds, from the start on, where it was measured. Bands: range of the "
    "seeds. Dots: end of the budget; a line goes on to the end of a run of as many images."
)


def at_equal_time(cells: Sequence[Result]) -> list[Result]:
    """Return what cells had after equal seconds, with variant and seed.

    "course" holds what was measured in the same run at other times, in rising order.
    """
    return [
        {
            "variant": cell["variant"],
            "seed": cell["seed"],
            **cell["equal_seconds"],
            "course": course_of(cell),
        }
        for cell in cells
        if "equal_seconds" in cell
    ]


def course_of(cell: Result) -> list[Result]:
    """Return what a cell had after half of the images, equal seconds and equal images."""
    budget = cell["equal_seconds"]
    if not budget["steps"]:
        return []
    per_image = budget["seconds"] / budget["images"]
    points = [budget]
    if "half" in cell:  # neither merged nor begun as another variant: a course of its own
        points += [
            {**part, "seconds": part["images"] * per_image}
            for part in (cell["half"], {"scores": {}, **cell})
        ]
    return sorted(points, key=lambda point: float(point["seconds"]))


def load_kernels(cells: Path, results: Sequence[Result]) -> Kernels:
    """Return the shifts of the kernel distances that cells have written.

    Args:
        cells: Directory of the cells.
        results: Results of the finished cells.
    """
    found = {}
    for cell in results:
        path = cells / cell["variant"] / f"seed-{cell['seed']}" / "kernel-seconds.npz"
        if path.is_file():
            with np.load(path) as file:
                found[cell["variant"], cell["seed"]] = {key: file[key] for key in file.files}
    return found


def board_table(groups: Groups, baseline: str, kernels: Kernels) -> Table:
    """Return a row for each variant."""
    parts = list(next(iter(groups.values()))[0]["loss_of_part"])
    header = ["variant", "steps", "images", "seconds", "TFLOP", "loss x 1e5"]
    header += [f"% of {baseline}", *(f"{part}, %" for part in parts)]
    header += ["KID x 1e3", f"KID, % of {baseline}"] if kernels else []
    rows: list[list[str | int | float]] = []
    for name, cells in groups.items():
        row: list[str | int | float] = [name, *cost_cells(cells[0])]
        row.append(mean_of([1e5 * cell["loss"] for cell in cells], 1))
        for value in (loss_of, *map(part_of, parts)):
            own, base = by_seed(cells, value), by_seed(groups[baseline], value)
            row.append("" if name == baseline else as_text(paired(own, base)))
        if kernels:
            row.append(mean_of([1e3 * kid for kid in by_seed(cells, kid_of).values()], 1))
            row.append(
                "" if name == baseline else as_text(of_kernels(groups, kernels, name, baseline))
            )
        rows.append(row)
    return Table(header, rows, caption=CAPTION)


def cost_cells(cell: Result) -> list[str | int | float]:
    """Return steps, images, seconds and operations of a cell."""
    if not cell["steps"]:
        return [0, 0, 0, ""]
    flops = cell["network_flops"] + cell["mixing_flops"]
    return [cell["steps"], cell["images"], f"{cell['seconds']:.0f}", f"{flops / 1e12:.1f}"]


def by_seed(cells: Sequence[Result], value: Value) -> dict[int, float]:
    """Return a value of each cell that has it, by seed."""
    found = {cell["seed"]: value(cell) for cell in cells}
    return {seed: number for seed, number in found.items() if number is not None}


def loss_of(cell: Result) -> float | None:
    """Return the validation loss."""
    return float(cell["loss"])


def part_of(part: str) -> Value:
    """Return what gives the loss of a part of the timesteps."""
    return lambda cell: float(cell["loss_of_part"][part])


def kid_of(cell: Result) -> float | None:
    """Return the kernel distance, None if no samples were drawn."""
    scores = cell.get("scores", {}).get("scores", {})
    found = [score["value"] for name, score in scores.items() if name.startswith("KID")]
    return float(found[0]) if found else None


def of_kernels(groups: Groups, kernels: Kernels, name: str, baseline: str) -> Paired | None:
    """Compare the kernel distances of a variant with those of the baseline."""

    def shifts(variant: str) -> dict[int, Mapping[str, np.ndarray]]:
        """Return the shifts of a variant by seed."""
        return {seed: found for (name, seed), found in kernels.items() if name == variant}

    ours, theirs = by_seed(groups[name], kid_of), by_seed(groups[baseline], kid_of)
    return paired_kernels(ours, shifts(name), theirs, shifts(baseline))


def board_figure(groups: Groups) -> Figure:
    """Draw loss, and KID if there is any, of every variant against the seconds of its training.

    Lines begin at the start, if it was measured; bands are the range of the seeds.
    """
    panels: list[tuple[Value, float, str]] = [(loss_of, 1e5, "validation loss x 1e5")]
    if any(kid_of(cell) is not None for cells in groups.values() for cell in cells):
        panels.append((kid_of, 1e3, "KID x 1e3"))
    figure = Figure(figsize=(4.5 * len(panels) + 2, 4), dpi=150, layout="constrained")
    for axes, (value, scale, label) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        against_seconds(axes, groups, value, scale)
        axes.set_xlabel("seconds of training")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    return figure


def against_seconds(axes: Axes, groups: Groups, value: Value, scale: float) -> None:
    """Draw a value of every variant, times a scale, against the seconds of its training."""
    origin = by_seed(groups.get(START, ()), value)
    start = scale * float(np.mean(list(origin.values()))) if origin else np.inf
    for number, (name, cells) in enumerate(groups.items()):
        values = scale * np.array(list(by_seed(cells, value).values()))
        if name == START or not len(values):
            continue
        color = plots.COLORS[number % (len(plots.COLORS) - 1)]
        style = plots.LINES[number // (len(plots.COLORS) - 1) % len(plots.LINES)]
        if values.mean() > WORSE * start:
            axes.plot([], [], style, color=color, label=f"{name}: {values.mean():.0f}, not shown")
            continue
        times, rows = courses([c for c in cells if value(c) is not None], value)
        curves = scale * np.stack([rows.mean(0), rows.min(0), rows.max(0)])
        if origin:
            times, curves = np.insert(times, 0, 0), np.insert(curves, 0, start, axis=1)
        seconds = float(np.median([cell["seconds"] for cell in cells]))
        end = [int(np.abs(times - seconds).argmin())]
        mean, low, high = curves
        axes.plot(times, mean, f"{style}o", markevery=end, color=color, linewidth=1, label=name)
        axes.fill_between(times, low, high, color=color, alpha=0.2, linewidth=0)


def courses(cells: Sequence[Result], value: Value) -> tuple[np.ndarray, np.ndarray]:
    """Return the times (P,) at which all seeds have a value, and the values (S, P)."""
    rows = [
        [
            (float(point["seconds"]), number)
            for point in cell["course"]
            if (number := value(point)) is not None
        ]
        for cell in cells
    ]
    places = range(min(map(len, rows)))
    times = [float(np.median([row[place][0] for row in rows])) for place in places]
    return np.array(times), np.array([[row[place][1] for place in places] for row in rows])
