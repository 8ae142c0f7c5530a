"""When a run saves and ends between the steps that are due: by time, or because it is asked to.

All processes have to act after the same step, whichever of them had a signal; the first looks at
the clock (`distributed.Wishes`).
"""

import os
import time

from remixdit.distributed import Ranks, Wishes
from remixdit.training.config import OutputConfig, seconds_of

__all__ = ["Stop", "Watch"]


class Stop:
    """A wish that a run saves and ends; a signal handler may state it at any time.

    `--stop-after` counts from when this is made, and torchrun, the parent of several processes, is
    known from then on: made before they meet, as they cannot meet without it.
    """

    reason = ""
    """What ended the run early, e.g. SIGTERM; "" for nothing."""
    waits = False
    """Whether a step is under way, after which the run saves and ends; else it may end at once."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.parent = os.getppid()

    def ask(self, reason: str) -> None:
        """Let the run end after the step; the first reason is kept."""
        self.reason = self.reason or reason


class Watch:
    """Decides after every step, on all processes alike.

    Args:
        output: How often to save, and when to stop.
        ranks: Rank of this process.
        stop: Wish to end the run.
    """

    def __init__(self, output: OutputConfig, ranks: Ranks, stop: Stop) -> None:
        self.output, self.ranks, self.stop = output, ranks, stop
        self.limit = seconds_of(output.stop_after)
        self.saved = time.monotonic()
        self.wishes = Wishes()

    def after_step(self, is_saved: bool) -> tuple[bool, bool]:
        """Return whether the run ends after this step, and whether it saves.

        Args:
            is_saved: Whether a checkpoint is due anyhow.
        """
        now, saves = time.monotonic(), False
        if self.ranks.is_first:
            if self.limit and now - self.stop.began >= self.limit:
                self.stop.ask(f"--stop-after {self.output.stop_after}")
            minutes = self.output.save_minutes
            saves = bool(minutes) and now - self.saved >= 60 * minutes
        if is_saved or saves:
            self.saved = now
        if self.ranks.num_ranks > 1 and os.getppid() != self.stop.parent:
            self.stop.ask("the end of torchrun")
        stops, saves = self.wishes.exchange(bool(self.stop.reason), saves)
        if stops:
            self.stop.ask("a signal to another process")
        return stops, is_saved or saves or stops
