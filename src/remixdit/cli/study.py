"""`remixdit study NAME`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Annotated

import tyro
from tyro.conf import Positional

from remixdit.cli.arguments import base_config, parse
from remixdit.cli.checkpoints import newest_start
from remixdit.cli.terminal import Bar, say
from remixdit.study.config import StudyConfig
from remixdit.study.study import study
from remixdit.study.variants import STUDIES, VARIANTS

__all__ = ["run"]

HELP = """\
usage: remixdit study NAME --data SHARDS --held-out SHARDS --from PLAIN --output-dir DIR [OPTIONS]

{studies}

variants (NAME@0.25: at a quarter of the learning rate):
{variants}

remixdit study NAME --help    lists all options
"""


@dataclass(frozen=True, kw_only=True)
class StudyArguments(StudyConfig):
    """Compare variants at equal budget: the same start, images and steps."""

    name: Positional[str]
    """Name of the study; `remixdit study --help` lists them."""
    init_from: Annotated[str, tyro.conf.arg(name="from")]
    """The plain DiT that every variant starts from."""


def run(args: Sequence[str]) -> None:
    """Run the cells that are missing and write the report."""
    if not args or args[0] in ("-h", "--help"):
        studies = (study_line(name, names) for name, names in STUDIES.items())
        variants = (f"  {name:22}{variant.summary}" for name, variant in VARIANTS.items())
        print(HELP.format(studies="\n".join(studies), variants="\n".join(variants)), end="")
        return
    if (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"study must run in one process, without torchrun, got {count} processes")
    config = base_config(parse(StudyArguments, args, "study"), StudyConfig)
    newest_start(config.init_from)  # says which step the variants start from
    try:
        with Bar(f"study {config.name}", 1) as bar:
            for progress in study(config):
                bar.update(progress.done, progress.note, total=progress.total)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command resumes") from None
    say(f"look at {config.output_dir / 'report.html'}")


def study_line(name: str, variants: Sequence[str]) -> str:
    """Return a study and its variants, folded to the width of a terminal."""
    text = f"  {name:18}{', '.join(variants)}"
    return fill(text, 100, subsequent_indent=" " * 20, break_on_hyphens=False)
