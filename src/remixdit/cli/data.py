"""`remixdit data check DIR`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tyro.conf import Positional

from remixdit.cli.arguments import parse
from remixdit.cli.results import write_result
from remixdit.cli.terminal import follow, show
from remixdit.data.check import check
from remixdit.figures.text import one_line

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class CheckArguments:
    """Verify shards: files, checksums, labels and the statistics of the latents."""

    directory: Positional[Path]
    """Directory of shards that `remixdit encode` wrote."""
    output: Path | None = None
    """File for a contact sheet of up to 64 images, a .png."""


def run(args: Sequence[str]) -> None:
    """Check a directory of shards and print the findings."""
    action, *rest = args or [""]
    if action in ("-h", "--help"):
        print("usage: remixdit data check DIR [--output contact-sheet.png]")
        return
    if action != "check":
        raise ValueError(f"data must be followed by check, got {action!r}")
    arguments = parse(CheckArguments, rest, "data check")
    output: Path | None = arguments.output
    if output is not None and (output.suffix != ".png" or not output.parent.is_dir()):
        raise ValueError(f"output must be a .png in a directory that exists, got {output}")
    report = follow(check(arguments.directory), {"check": "files"})
    show("\n".join(map(one_line, report.summary())))
    if output is not None and report.contact_sheet is not None:
        write_result(output, partial(report.contact_sheet.save, format="png"))
    if report.problems:
        raise ValueError(f"{arguments.directory} has {len(report.problems)} problems")
