"""Signals that end training: it saves after the step under way, then ends.

SIGTERM and SIGUSR1 are what schedulers send before they end a job, SIGINT is Ctrl-C.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from remixdit.training.stopping import Stop

__all__ = ["INTERRUPTED", "TEMPORARY", "stopped_by_signals"]

TEMPORARY = os.EX_TEMPFAIL  # 75: the same command goes on, at once or later
INTERRUPTED = 130
# torchrun passes on a Ctrl-C that the terminal has sent to its processes too.
SAME_SECONDS = 1.0


@contextmanager
def stopped_by_signals(stop: Stop) -> Iterator[None]:
    """Let signals ask a run to stop; a second Ctrl-C ends the process at once."""
    interrupts: list[float] = []

    def hear(number: int, frame: FrameType | None) -> None:
        stop.ask(signal.Signals(number).name)
        if number == signal.SIGINT:
            interrupts.append(time.monotonic())
            if interrupts[-1] - interrupts[0] > SAME_SECONDS:
                leave()
        if not stop.waits:  # nothing to save yet
            raise KeyboardInterrupt

    before = {
        number: signal.signal(number, hear)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave() -> None:
    """End at once, whatever threads and other processes are doing; files are whole regardless."""
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # the progress bar hides the cursor
    os._exit(INTERRUPTED)
