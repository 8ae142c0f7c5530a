"""Room in memory for pictures that are being decoded, shared by all threads.

A picture takes up to 25 bytes a pixel while it is decoded, rotated and converted, so that many
threads with a large picture each would need tens of GB. They wait for each other instead.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

__all__ = ["BYTES_PER_PIXEL", "MAX_PIXELS", "Room", "room"]

MAX_PIXELS = 2**26  # of one picture: 8,192 x 8,192; 1.7 GB while it is decoded
BYTES_PER_PIXEL = 25  # at most, measured over formats and modes: JPEG 2000 with transparency
MEMORY_FRACTION = 1 / 8  # of the machine's memory, unless one picture needs more


class Room:
    """A number of pixels that threads take and give back."""

    def __init__(self, num_pixels: int) -> None:
        self.num_pixels, self.taken, self._changed = num_pixels, 0, Condition()

    @contextmanager
    def of(self, num_pixels: int) -> Iterator[None]:
        """Wait until there is room for `num_pixels`, which is at most all of it, and hold it."""
        with self._changed:
            self._changed.wait_for(lambda: self.taken + num_pixels <= self.num_pixels)
            self.taken += num_pixels
        try:
            yield
        finally:
            with self._changed:
                self.taken -= num_pixels
                self._changed.notify_all()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows
        return 0


room = Room(max(MAX_PIXELS, int(_memory_bytes() * MEMORY_FRACTION) // BYTES_PER_PIXEL))
