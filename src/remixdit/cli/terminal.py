"""Progress on stderr: a bar in a terminal, elsewhere a plain line a minute.

Of several processes only the first speaks, except for errors.
"""

import os
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack
from types import MappingProxyType, TracebackType
from typing import Self, TypeVar

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Column

from remixdit.figures.text import one_line, printable
from remixdit.progress import Progress

__all__ = ["Bar", "follow", "is_first", "say", "show"]

LINE_SECONDS = 60
BAR_WIDTH = 16  # leaves room for loss and speed in 80 columns

Result = TypeVar("Result")
NO_UNITS: Mapping[str, str] = MappingProxyType({})


def follow(work: Generator[Progress, None, Result], units: Mapping[str, str] = NO_UNITS) -> Result:
    """Run long work with a bar for each of its stages, and return its result.

    Args:
        work: Yields its progress.
        units: The name of a stage => what its bar counts; other stages show no speed.
    """
    with ExitStack() as stack:
        bar = None
        while True:
            try:
                stage, done, total, note = next(work)
            except StopIteration as end:
                return end.value
            if bar is None or bar.name != stage:
                stack.close()  # leaves the bar of the stage before as it is
                bar = stack.enter_context(Bar(stage, total, units.get(stage, "")))
            bar.update(done, note, total=total)


def say(text: str) -> None:
    """Write one line to stderr."""
    if is_first():
        print(f"remixdit: {one_line(text)}", file=sys.stderr)


def show(result: str) -> None:
    """Write a result to stdout."""
    print(printable(result))


def is_first() -> bool:
    """Whether this process is the only one, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


class Bar:
    """How far something has come; use in a `with`.

    Args:
        name: Name of the work.
        total: Steps or images in all.
        unit: What is counted in the speed shown; none shows no speed.
        scale: Units for one of `total`.
    """

    def __init__(self, name: str, total: int, unit: str = "", scale: int = 1) -> None:
        self.name, self.total, self.unit, self.scale = name, total, unit, scale
        self.progress: rich_progress.Progress | None = None
        self.started, self.first = time.monotonic(), -1
        self.said = self.started

    def __enter__(self) -> Self:
        """Show the bar, in a terminal."""
        if sys.stderr.isatty() and is_first():
            self.progress = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}", table_column=whole()),
                rich_progress.BarColumn(BAR_WIDTH, table_column=whole()),
                rich_progress.MofNCompleteColumn(table_column=whole()),
                # What is left of the line, in which the first facts are the last to be cut.
                rich_progress.TextColumn(
                    "{task.fields[facts]}",
                    table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
                ),
                rich_progress.TimeRemainingColumn(table_column=whole()),
                console=Console(stderr=True),
                expand=True,
            )
            self.progress.add_task(self.name, total=self.total, facts="")
            self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bar as it is."""
        if self.progress is not None:
            self.progress.stop()

    def update(self, done: int, *facts: str, total: int | None = None) -> None:
        """Show that `done` of the total are done, and facts, those of a run separated by commas."""
        now, self.total = time.monotonic(), total or self.total
        if self.first < 0:  # a resumed run begins in the middle
            self.started, self.first = now, done
        speed = (done - self.first) * self.scale / max(now - self.started, 1e-9)
        shown = [part for fact in facts if fact for part in fact.split(", ")]
        if self.unit and speed:  # after the loss, so that a narrow terminal shows both
            shown.insert(1, f"{speed:,.{0 if speed >= 10 else 2}f} {self.unit}/s")
        if self.progress is not None:
            task = self.progress.task_ids[0]
            self.progress.update(task, completed=done, total=self.total, facts=", ".join(shown))
        elif now - self.said >= LINE_SECONDS and speed:
            left = (self.total - done) * self.scale / speed
            text = ", ".join([f"{self.name} {done}/{self.total}", *shown, f"{clock(left)} left"])
            say(text)
            self.said = now

    def show(self, fact: str) -> None:
        """Show what happens before the first step."""
        now = time.monotonic()
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], facts=fact)
        elif now - self.said >= LINE_SECONDS:
            say(fact)
            self.said = now


def whole() -> Column:
    """Return a column of the bar that is never cut."""
    return Column(no_wrap=True)


def clock(seconds: float) -> str:
    """Return hours, minutes and seconds, such as 1:02:03."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
