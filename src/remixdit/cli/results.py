"""Results as JSON, and the files that they go to."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from remixdit.cli.terminal import say
from remixdit.files import write_file

__all__ = ["as_json", "claim", "write_json", "write_result"]


def claim(paths: Iterable[Path], overwrite: bool) -> None:
    """Make sure that results can be written to files, before long work begins."""
    for path in paths:
        if path.exists() and not overwrite:
            raise ValueError(f"output must not exist (--overwrite replaces it), got {path}")
        there = next(parent for parent in path.absolute().parents if parent.exists())
        if not there.is_dir():
            raise ValueError(f"output must be in a directory, got {path.parent}")


def write_result(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file and print its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, write)
    say(f"wrote {path}")


def write_json(path: Path, result: Any) -> None:
    """Write a result as JSON and print the path."""
    text = as_json(result) + "\n"
    write_result(path, lambda beside: beside.write_text(text, "utf-8"))


def as_json(result: Any) -> str:
    """Return strict JSON: a number that is not finite becomes null."""
    return json.dumps(finite(result), indent=1, ensure_ascii=False, allow_nan=False)


def finite(value: Any) -> Any:
    """Return JSON values with None for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [finite(item) for item in value]
    return value
