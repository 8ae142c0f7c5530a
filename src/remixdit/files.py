"""Files and directories that are whole or not there."""

from collections.abc import Callable
from pathlib import Path

__all__ = ["write_file"]


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file beside its place, then rename it."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
