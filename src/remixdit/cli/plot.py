"""`remixdit plot RUN`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from remixdit.cli.arguments import parse, refuse_moved
from remixdit.cli.checkpoints import newest_weights
from remixdit.cli.results import write_result
from remixdit.model.loading import newest_checkpoint

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class PlotArguments:
    """Plot the loss, the coefficients and the gradients of the logits of a training run."""

    run: Positional[Path]
    """Directory of a run, finished or not."""
    output: Path | None = None
    """Directory for the figures, by default RUN/plots. Earlier figures are replaced."""
    format: Literal["png", "svg", "pdf"] = "png"
    """Format of the figures: png, svg or pdf. The animation of the coefficients is a GIF."""


def run(args: Sequence[str]) -> None:
    """Draw and save the figures."""
    refuse_moved(args, ("--held-out", "--held-out-images"), "losses RUN --data HELD_OUT")
    arguments = parse(PlotArguments, args, "plot")
    from remixdit.evaluation.run_figures import run_animation, run_figures
    from remixdit.figures.plots import save  # matplotlib takes a while

    output: Path = arguments.output or arguments.run / "plots"
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a directory, got the file {output}")
    if newest_checkpoint(arguments.run) is not None:
        newest_weights(str(arguments.run))  # says which step the coefficients are of
    for name, figure in run_figures(arguments.run):
        path = output / f"{name}.{arguments.format}"
        write_result(path, partial(save, figure, kind=arguments.format))
    animation = run_animation(arguments.run)
    if animation is not None:
        write_result(output / "coefficients.gif", animation.save)
