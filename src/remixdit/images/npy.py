"""Files .npy and .npz: what a header asks for is compared with what is there before it is read."""

import lzma
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

__all__ = ["ZIP_ERRORS", "npy_header", "npz_array", "npz_names", "npz_stream"]

# What zipfile raises of a damaged archive.
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,  # a compression that is unknown
    RuntimeError,  # a password
    MemoryError,
    OverflowError,
)

Header = tuple[tuple[int, ...], bool, np.dtype[Any]]  # shape, whether rows lie in columns, dtype

READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def npy_header(file: IO[bytes]) -> Header:
    """Read the start of an .npy file; return shape, whether rows lie in columns, and dtype.

    Raises:
        ValueError: It is no .npy, is cut short, or holds Python objects, which are pickles.
    """
    try:
        version = np.lib.format.read_magic(file)
        shape, is_fortran, dtype = READERS[version](file)
    except OSError:
        raise
    except Exception as error:  # numpy parses it as Python: tokenize's errors, RecursionError, ...
        raise ValueError(f"its .npy header cannot be read: {error}") from error
    if dtype.hasobject:
        raise ValueError(f"it holds Python objects, got dtype {dtype}")
    if any(size < 0 for size in shape):
        raise ValueError(f"its shape must not be negative, got {shape}")
    return shape, is_fortran, dtype


def npz_names(path: Path) -> list[str]:
    """Return the names of the arrays in an .npz file."""
    with _npz(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


@contextmanager
def npz_stream(path: Path, name: str) -> Iterator[tuple[IO[bytes], Header]]:
    """Open an array of an .npz file where its numbers begin; give its checked header too.

    Raises:
        ValueError: There is no such array, or its size is not what its header says.
    """
    with _npz(path) as archive:
        try:
            file, header = _opened(archive, name)
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as npz: {error}") from error
        with file:
            yield file, header


def npz_array(path: Path, name: str) -> np.ndarray:
    """Read an array of an .npz file; errors are those of `npz_stream`."""
    with npz_stream(path, name):
        pass  # its header is checked
    with _npz(path) as archive, archive.open(f"{name}.npy") as file:
        try:
            array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as npz: {error}") from error
    return array


@contextmanager
def _npz(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except ZIP_ERRORS as error:
        raise ValueError(f"{path} cannot be read as npz: {error}") from error


def _opened(archive: zipfile.ZipFile, name: str) -> tuple[IO[bytes], Header]:
    """Open an array after its header: what a lying one asks for is not allocated."""
    names = archive.namelist()
    if f"{name}.npy" not in names:
        held = ", ".join(held.removesuffix(".npy") for held in names)
        raise ValueError(f"it must hold {name}, got {held}")
    file = archive.open(f"{name}.npy")
    shape, is_fortran, dtype = npy_header(file)
    num_bytes = file.tell() + math.prod(shape) * dtype.itemsize
    stored = archive.getinfo(f"{name}.npy").file_size
    if num_bytes != stored:
        raise ValueError(
            f"{name}.npy must hold {num_bytes} bytes for {shape} {dtype}, got {stored}"
        )
    return file, (shape, is_fortran, dtype)
