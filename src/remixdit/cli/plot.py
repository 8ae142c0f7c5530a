"""`remixdit plot RUN`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tyro.conf import Positional

from remixdit import distributed
from remixdit.cli.arguments import parse
from remixdit.cli.terminal import Bar, say
from remixdit.model.loading import load_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class PlotArguments:
    """Draw the losses, the coefficients and their gradients of a training run."""

    run: Positional[Path]
    """The directory of a run, finished or not."""
    output: Path | None = None
    """Where the figures go; by default RUN/plots. Earlier figures are replaced."""
    held_out: str | None = None
    """Images that the run was not trained on: adds losses by interval, and of every expert."""
    held_out_images: int = 250
    """So many of them, spread over the data."""
    device: str = "auto"
    """auto, cpu or cuda: where they are measured."""


def run(args: Sequence[str]) -> None:
    """Draw and save the figures."""
    arguments = parse(PlotArguments, args, "plot")
    from remixdit.evaluation.run_figures import run_figures
    from remixdit.figures.plots import save  # matplotlib takes a while

    output: Path = arguments.output or arguments.run / "plots"
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a directory, got the file {output}")
    # Measured before anything is written, as the images may be refused.
    measured = [] if arguments.held_out is None else list(measure(arguments, arguments.held_out))
    for name, figure in [*run_figures(arguments.run), *measured]:
        output.mkdir(parents=True, exist_ok=True)
        save(figure, output / f"{name}.png")
        say(f"wrote {output / name}.png")


def measure(arguments: PlotArguments, held_out: str) -> "Iterator[tuple[str, Figure]]":
    """Yield the figures of losses on held-out images."""
    from remixdit.evaluation.held_out import (
        expert_losses,
        held_out_figures,
        held_out_images,
        intervals_of,
    )

    device = distributed.pick_device(arguments.device)
    model = load_model(arguments.run, device=str(device))
    held = held_out_images(held_out, model.config, arguments.held_out_images)
    intervals = intervals_of(arguments.run, model)
    losses = []
    with Bar("measure", model.num_experts, "experts") as bar:
        for rows in expert_losses(model, held, intervals):
            losses.append(rows)
            bar.update(len(losses))
    yield from held_out_figures(np.array(losses), intervals)
