"""`remixdit quickstart`."""

import sys
from collections.abc import Sequence
from itertools import groupby

from remixdit.cli.arguments import parse
from remixdit.cli.next_steps import remixdit_command, say_next
from remixdit.cli.terminal import Bar, say
from remixdit.study.quickstart import RUNS, QuickstartConfig, next_commands, quickstart

__all__ = ["run"]


def run(args: Sequence[str]) -> None:
    """Run all stages, with a bar each, and say where to look."""
    config = parse(QuickstartConfig, args, "quickstart")
    stages = quickstart(config, remixdit_command())
    try:
        for stage, reports in groupby(stages, key=lambda progress: progress.stage):
            if not sys.stderr.isatty():
                say(stage)
            is_run = stage in RUNS
            with Bar(stage, 1, "images" if is_run else "", config.batch_size) as bar:
                for progress in reports:
                    bar.update(progress.done, progress.note, total=progress.total)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command resumes") from None
    say_next(f"look at {config.output_dir / 'report.html'}", *next_commands(config))
