"""One .npy file on disk, of which random rows are read.

The file could be memory-mapped, as `np.load(path, mmap_mode="r")` does. It is read by position
instead, because a page that is not in memory would stop the whole interpreter while it is fetched,
training included, and because what is mapped counts as memory of the process. The kernel is told
which rows are wanted before they are read, so a disk serves all of a batch at once: five times as
many rows a second as one after the other (docs/data.md).
"""

import os
from pathlib import Path

import numpy as np

from remixdit.images.npy import npy_header

__all__ = ["RowFile"]

CAN_ADVISE = hasattr(os, "posix_fadvise")  # not on macOS


class RowFile:
    """The rows (n, *) of an .npy file.

    Raises:
        ValueError: The file is missing, no .npy, or of another shape or dtype than expected.
        OSError: The disk fails, now or when a row is read.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str) -> None:
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        self._row_bytes = int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
        try:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise ValueError("it is no regular file")
            self._file = path.open("rb", buffering=0)
            found, is_fortran, found_dtype = npy_header(self._file)
            self._first_byte = self._file.tell()
            found_bytes = self._file.seek(0, os.SEEK_END) - self._first_byte
            if is_fortran:
                raise ValueError("its rows lie in columns")
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"shard {path} cannot be read: {error}") from error
        if (found, found_dtype) != (shape, np.dtype(dtype)):
            raise ValueError(f"shard {path} must be {shape} {dtype}, got {found} {found_dtype}")
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
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if num_bytes != self._row_bytes:  # it was whole when it was opened
            raise OSError(f"shard {self.path} ends in the middle of row {index}")

    def rows(self) -> np.ndarray:
        """Read all rows into memory."""
        self._file.seek(self._first_byte)
        values: np.ndarray = np.fromfile(self._file, self.dtype)
        if values.nbytes != self.shape[0] * self._row_bytes:
            raise OSError(f"shard {self.path} was cut short while it was read")
        return values.reshape(self.shape)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def _advise(self, start: int, num_bytes: int, advice: str) -> None:
        if CAN_ADVISE:
            os.posix_fadvise(self._file.fileno(), start, num_bytes, getattr(os, advice))
