"""The results of a study: means over seeds, paired differences, tables and figures.

    results.json    all results, one entry for each cell
    table.md        the table, for a document; board.md, that of equal time, and board.png
    samples.png     the same noise through every variant
    report.html     table, figures and settings in one file

Runs of the same seed saw the same images, timesteps and noise, so variants are compared seed by
seed: difference in per cent, its mean, its 95 % interval by Student's t over seeds, and how many
seeds are better.

Shapes: S seeds, I intervals.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from remixdit.figures import plots
from remixdit.figures.axes import new_figure
from remixdit.figures.html import Block, Heading, Picture, Table, Text, write_report
from remixdit.files import write_file
from remixdit.study.board import (
    NOTE,
    at_equal_time,
    board_figure,
    board_table,
    load_kernels,
)
from remixdit.study.paired import Paired, as_text, mean_of, paired
from remixdit.study.pictures import samples_of_variants

__all__ = ["result_table", "those_of", "write_study"]

BASELINES = ("continued", "stratified", "independent", "independent-shared")
PREFERRED = ("stratified", "continued")  # baselines of figures
MAX_CURVES = 6  # curves in one figure
Result = dict[str, Any]


def write_study(
    directory: Path,
    settings: Mapping[str, Any],
    results: Sequence[Result],
    summaries: Mapping[str, str],
) -> None:
    """Write the results so far.

    Args:
        directory: Directory of the study.
        settings: Settings of the study.
        results: Results of the finished cells.
        summaries: Summary of each variant, in one line.
    """
    if not results:
        return
    table = result_table(results, with_half=settings.get("lr_schedule") == "constant")
    text = json.dumps({"settings": settings, "cells": results}, indent=1, default=str) + "\n"
    write_file(directory / "results.json", lambda beside: beside.write_text(text, "utf-8"))
    lines = markdown(table)
    write_file(directory / "table.md", lambda beside: beside.write_text(lines, "utf-8"))
    blocks: list[Block] = [Text(introduction(settings, results))]
    blocks += equal_time(directory, results)
    blocks += [table, Text(WHY_SLOWER)]
    blocks += [*samples_of_variants(directory, results), *figures(results, settings["name"])]
    blocks += [
        Heading("Variants"),
        Table(["variant", "what"], [[name, summaries[name]] for name in by_variant(results)]),
        Heading("Settings"),
        Table(["setting", "value"], [[k, str(v)] for k, v in settings.items()]),
    ]
    write_file(
        directory / "report.html",
        partial(write_report, title=f"Study {settings['name']}", blocks=blocks),
    )


def equal_time(directory: Path, results: Sequence[Result]) -> list[Block]:
    """Write board.md and board.png, and return both; nothing for a budget of images."""
    groups = by_variant(at_equal_time(results))
    baseline = next(iter(those_of(PREFERRED, groups)), "")
    if not baseline:
        return []
    kernels = load_kernels(directory / "cells", results)
    table, figure = board_table(groups, baseline, kernels), board_figure(groups)
    lines = markdown(table)
    write_file(directory / "board.md", lambda beside: beside.write_text(lines, "utf-8"))
    write_file(directory / "board.png", partial(figure.savefig, format="png"))
    what = "Loss, and KID if samples were drawn, of every variant against the seconds of training"
    picture = Picture(figure, NOTE, what)
    return [Heading("At equal time"), table, picture, Heading("From equal images")]


def by_variant(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the cells of each variant, in the order in which variants first appear."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result["variant"], []).append(result)
    return found


def losses(cells: Sequence[Result]) -> dict[int, float]:
    """Return the validation loss by seed."""
    return {cell["seed"]: cell["loss"] for cell in cells}


def score_of(cell: Result, prefix: str) -> float | None:
    """Return a score by the start of its name, such as KID."""
    found = cell.get("scores", {}).get("scores", {})
    values = [score["value"] for name, score in found.items() if name.startswith(prefix)]
    return values[0] if values else None


def result_table(results: Sequence[Result], with_half: bool = False) -> Table:
    """Return a row for each variant.

    Args:
        results: Results of the finished cells.
        with_half: Hold what each has half of the way against what the first baseline has at its
            end; for constant learning rates, as others have not been annealed by then.
    """
    groups = by_variant(results)
    baselines = those_of(BASELINES, groups)
    first = next(iter(those_of(PREFERRED, groups)), "")
    kid = any(score_of(cell, "KID") is not None for cell in results)
    header = ["variant", "seeds", "loss x 1e5"]
    header += [f"% of {name}" for name in baselines]
    halves = baselines[:1] if with_half else []
    header += [f"half-way, % of {name}" for name in halves]
    header += ["intervals alike, %"] if first in groups else []
    header += ["KID x 1e3"] * kid + ["images", "FLOPs", "images/s"]
    rows: list[list[str | int | float]] = []
    for name, cells in groups.items():
        row: list[str | int | float] = [name, len(cells)]
        row.append(mean_of([1e5 * cell["loss"] for cell in cells], 1))
        row += [
            "" if name == baseline else as_text(paired(losses(cells), losses(groups[baseline])))
            for baseline in baselines
        ]
        for baseline in halves:
            half = {cell["seed"]: cell["half"]["loss"] for cell in cells if "half" in cell}
            row.append(as_text(paired(half, losses(groups[baseline]))))
        if first in groups:
            row.append("" if name == first else as_text(by_interval(cells, groups[first])))
        if kid:
            scored = [s for cell in cells if (s := score_of(cell, "KID")) is not None]
            row.append(mean_of([1e3 * s for s in scored], 1))
        row += cost_cells(cells)
        rows.append(row)
    return Table(header, rows, caption=CAPTION)


def those_of(kinds: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return the variants of some kinds: as named, or if there is none at other learning rates."""
    found = {kind: [name for name in names if name.partition("@")[0] == kind] for kind in kinds}
    return [name for kind, rates in found.items() for name in ([kind] if kind in rates else rates)]


CAPTION = (
    "Loss: mean over 40 intervals of timesteps of the squared error on held-out images, of the "
    "averaged weights; ± is the standard deviation over seeds. Per cent: the paired difference, "
    "with its 95 % interval (Student's t over seeds) and the seeds in which it is lower. Half-way: "
    "after half of the steps, against the baseline after all of them. Intervals alike: of the "
    "geometric mean over the intervals, against the stratified (or continued) DiT: the noisiest "
    "have a thousandth of the loss of the least noisy and hardly count in the mean."
)


WHY_SLOWER = (
    "At equal images a mixture takes more time than a plain DiT: every step mixes the weights of "
    "its experts, computes the gradients of K bases, and updates K times the weights. That cost "
    "depends on the size of the network alone, so its share falls as batches and images grow. "
    "Sampling costs what it costs with the plain DiT."
)


def by_interval(cells: Sequence[Result], baseline: Sequence[Result]) -> Paired | None:
    """Compare the losses of all intervals, each with equal weight whatever its size."""

    def logs(group: Sequence[Result]) -> dict[int, float]:
        """Return the geometric mean over the intervals by seed."""
        return {c["seed"]: float(np.exp(np.log(c["loss_by_interval"]).mean())) for c in group}

    return paired(logs(cells), logs(baseline))


def cost_cells(cells: Sequence[Result]) -> list[str | int | float]:
    """Return images, operations and speed of a variant's runs."""
    if "seconds" not in cells[0]:
        return [0, "", ""]
    flops = cells[0]["network_flops"] + cells[0]["mixing_flops"]
    speed = np.median([cell["images"] / cell["seconds"] for cell in cells])
    return [cells[0]["images"], f"{flops:.3e}", f"{speed:.0f}"]


def markdown(table: Table) -> str:
    """Return a table in Markdown."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    return f"{text}\n\n{table.caption}\n"


def introduction(settings: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Return a description of the study."""
    budget = settings["steps"] * settings["batch_size"]
    trained = [cell for cell in results if cell["images"] == budget]
    flops = [cell["network_flops"] + cell["mixing_flops"] for cell in trained]
    text = (
        f"Every variant starts from {settings['init_from']} and takes {settings['steps']} steps of "
        f"{settings['batch_size']} images of {settings['data']}, unless it says that it takes more "
        "or fewer; runs of the same seed see the same images in the same order. Measured "
        f"on {settings['num_held_out']} images of "
        f"{settings['held_out']}, with the same timesteps and noise for all."
    )
    if flops:
        spread = 100 * (max(flops) / min(flops) - 1)
        text += f" Computed operations of equal budgets differ by {spread:.2f} % at most."
    return text


def figures(results: Sequence[Result], study: str) -> list[Block]:
    """Return the gain of every variant, and the loss by interval of those that matter most."""
    groups = {name: cells for name, cells in by_variant(results).items() if cells[0]["images"]}
    if not groups:
        return []
    first = [*those_of(PREFERRED, groups), *groups][0]
    blocks: list[Block] = [Heading("Figures")]
    if len(groups) > 1:
        blocks.append(
            Picture(
                gains(groups, first, study),
                f"Paired difference from {first}: a dot a seed, a line the mean; lower is better.",
                f"Validation loss of every variant against {first}",
            )
        )
    order = [first, *(name for name in groups if name != first)]
    series = {
        name: np.mean([cell["loss_by_interval"] for cell in groups[name]], axis=0)
        for name in (order if len(order) <= MAX_CURVES else [first, *order[1 - MAX_CURVES :]])
    }
    ends = np.linspace(0, 1, 1 + len(series[first]))
    blocks.append(
        Picture(
            plots.loss_by_interval(series, ends, title=f"{study}: validation loss by interval"),
            f"Mean over seeds; t as a share of the way to noise. Below, against {first}.",
            "Validation loss in each interval",
        )
    )
    return blocks


def gains(groups: Mapping[str, Sequence[Result]], baseline: str, study: str) -> Figure:
    """Draw each variant's paired differences from a baseline, in per cent."""
    names = [name for name in groups if paired(losses(groups[name]), losses(groups[baseline]))]
    title = f"{study}: validation loss against {baseline}"
    figure = new_figure(
        8, 1.2 + 0.35 * len(names), title, "Dot: a seed. Line: the mean over seeds."
    )
    axes = figure.subplots()
    base = losses(groups[baseline])
    for row, name in enumerate(reversed(names)):
        own = losses(groups[name])
        ratios = [100 * (own[seed] / base[seed] - 1) for seed in sorted(own.keys() & base.keys())]
        axes.plot(ratios, [row] * len(ratios), "o", color=plots.COLORS[0], alpha=0.6)
        axes.plot([np.mean(ratios)] * 2, [row - 0.3, row + 0.3], color=plots.COLORS[1])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names[::-1])
    axes.set_xlabel(f"% above or below {baseline} (validation loss)")
    axes.grid(axis="x", alpha=0.3)
    return figure
