"""Ends this process when another has gone, though it may be waiting for it in a collective.

Every process counts up a number in the store that torchrun keeps, and watches that of the next. A
process on a machine that has failed, or one that hangs, counts no more; whoever sees it tells all.
Long compilations do no harm, because a thread of its own does the counting.
"""

import os
import sys
import threading
import time
from datetime import timedelta
from typing import NoReturn

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

__all__ = ["Heartbeat", "start", "stop"]

SECONDS = 5.0  # between beats; the environment may say otherwise
PATIENCE = 12  # beats: longer than any pause of an interpreter

running: list["Heartbeat"] = []  # at most one


def start(rank: int, num_ranks: int) -> None:
    """Begin to count, and to watch the next process."""
    seconds = float(os.environ.get("REMIXDIT_HEARTBEAT_SECONDS", SECONDS))
    running.append(Heartbeat(rank, num_ranks, seconds))


def stop() -> None:
    """Count and watch no more."""
    while running:
        # Called while an error is under way, it is not to look like the end of the work.
        running.pop().stop(finished=sys.exc_info()[0] is None)


class Heartbeat:
    """The thread that counts and watches.

    Args:
        rank: Of this process.
        num_ranks: All processes.
        seconds: Between beats.
    """

    def __init__(self, rank: int, num_ranks: int, seconds: float) -> None:
        self.rank, self.next_rank = rank, (rank + 1) % num_ranks
        self.seconds, self.patience = seconds, PATIENCE * seconds
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=self.patience))
        # A restart by torchrun must not hear of the dead of the attempt before.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = PrefixStore(f"remixdit/{attempt}", store)
        self.stopping, self.finished = threading.Event(), False
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.thread.start()

    def stop(self, finished: bool) -> None:
        """Count and watch no more; the others need not miss a process that has finished."""
        self.finished = finished
        self.stopping.set()
        self.thread.join()

    def _run(self) -> None:
        last, heard_at = -1, time.monotonic()
        while not self.stopping.wait(self.seconds):
            try:
                self.store.add(f"beats/{self.rank}", 1)
                beats = self.store.add(f"beats/{self.next_rank}", 0)
                finished = self.store.add(f"finished/{self.next_rank}", 0)
                gone = self.store.add("gone", 0)
            except RuntimeError:  # the store is where the first process is, or was
                beats, finished, gone = last, 0, 0
            if beats != last or finished:
                last, heard_at = beats, time.monotonic()
            if gone:
                end(f"process {self.rank} ends, as another no longer answers")
            if time.monotonic() - heard_at > self.patience:
                self._tell("gone")
                end(f"process {self.rank} ends, as process {self.next_rank} no longer answers")
        if self.finished:
            self._tell(f"finished/{self.rank}")

    def _tell(self, key: str) -> None:
        try:
            self.store.add(key, 1)
        except RuntimeError:  # without a store every process finds out for itself
            return


def end(reason: str) -> NoReturn:
    """End the process at once: its main thread may wait for what never comes."""
    text = f"remixdit: error: {reason}; the same command goes on from what was saved"
    print(text, file=sys.stderr, flush=True)
    os._exit(1)
