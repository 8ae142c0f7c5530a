"""One .npy file on disk, of which random rows are read.

The file could be memory-mapped, as `np.load(path, mmap_mode="r")` does. It is read by position
instead, because a page that is not in memory would stop the whole interpreter while it is fetched,
training included, and because what is mapped counts as memory of the process. The kernel is told
which rows are wanted before they are read, so a disk serves all of a batch at once: five times as
many rows a second as one after the other (docs/data.md).
"""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

__all__ = ["RowFile"]

CAN_ADVISE = hasattr(os, "posix_fadvise")  # not on macOS


class RowFile:
    """The rows (n, *) of an .npy file.

    Raises:
        ValueError: The file is missing, no .npy, or of another shape or dtype than expected.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str) -> None:
        self.path = path
        self._row_bytes = int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
        try:
            self._file = path.open("rb", buffering=0)
            found = _header(self._file)
            self._first_byte = self._file.tell()
            found_bytes = self._file.seek(0, os.SEEK_END) - self._first_byte
        except (OSError, ValueError) as error:
            raise ValueError(f"shard {path} cannot be read: {error}") from error
        if found != (shape, np.dtype(dtype)):
            raise ValueError(f"shard {path} must be {shape} {dtype}, got {found[0]} {found[1]}")
        if found_bytes != shape[0] * self._row_bytes:
            raise ValueError(f"shard {path} must hold {shape[0]} rows, got {found_bytes} bytes")
        self._advise(0, 0, "POSIX_FADV_RANDOM")  # no reading ahead: the next row is elsewhere

    def expect(self, index: int) -> None:
        """Have the kernel fetch a row in the background."""
        start = self._first_byte + index * self._row_bytes
        self._advise(start, self._row_bytes, "POSIX_FADV_WILLNEED")

    def read_into(self, index: int, buffer: memoryview) -> None:
        """Read row `index` into a buffer of its size."""
        start = self._first_byte + index * self._row_bytes
        try:
            num_bytes = os.preadv(self._file.fileno(), [buffer], start)
        except OSError as error:
            raise ValueError(f"shard {self.path} cannot be read: {error}") from error
        if num_bytes != self._row_bytes:
            raise ValueError(f"shard {self.path} ends in the middle of row {index}")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def _advise(self, start: int, num_bytes: int, advice: str) -> None:
        if CAN_ADVISE:
            os.posix_fadvise(self._file.fileno(), start, num_bytes, getattr(os, advice))


def _header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the start of an .npy file; return shape and dtype."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("it is no .npy file of version 1.0")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if is_fortran:
        raise ValueError("its rows lie in columns")
    return shape, dtype
