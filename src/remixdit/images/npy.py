"""The header of an .npy file, which says how much is to be read."""

from typing import IO, Any

import numpy as np

__all__ = ["npy_header"]

READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
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
