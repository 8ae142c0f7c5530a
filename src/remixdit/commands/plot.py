"""`remixdit plot RUN`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from remixdit.commands.arguments import parse
from remixdit.commands.terminal import say

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class PlotArguments:
    """Draw the losses, the coefficients and their gradients of a training run."""

    run: Positional[Path]
    """The directory of a run, finished or not."""
    output: Path | None = None
    """Where the figures go; by default RUN/plots. Earlier figures are replaced."""


def run(args: Sequence[str]) -> None:
    """Draw and save the figures."""
    arguments = parse(PlotArguments, args, "plot")
    from remixdit.plots import save  # matplotlib takes a while
    from remixdit.run_plots import run_figures

    output: Path = arguments.output or arguments.run / "plots"
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a directory, got the file {output}")
    for name, figure in run_figures(arguments.run):
        output.mkdir(parents=True, exist_ok=True)
        save(figure, output / f"{name}.png")
        say(f"wrote {output / name}.png")
