"""The directory of a training run: its configuration, its log, and the check on resume.

config.json         the settings, and the digest of the data
metrics.jsonl       one JSON object a line; `step` is the number of optimizer steps done
coefficients.jsonl  likewise, the table of a mixture, at fewer steps
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from remixdit.files import (
    LOCK_FILE,
    is_left_over,
    locked,
    make_directory,
    remove_left_overs,
    sync,
    write_file,
)
from remixdit.model.validation import json_object

__all__ = [
    "COEFFICIENTS_FILE",
    "DATA_DIR",
    "append_metrics",
    "check_run",
    "claim_run",
    "cut_metrics",
    "is_new",
    "location",
    "only_run",
    "read_metrics",
    "stated_settings",
    "sync_metrics",
]

logger = logging.getLogger(__name__)

METRICS_FILE, COEFFICIENTS_FILE = "metrics.jsonl", "coefficients.jsonl"
DATA_DIR = "data"  # where a run keeps what it encoded
FLAGS = {"init_from": "--from"}  # settings whose flags have other names
PLACES = {"data", "init_from", "further_bases"}  # settings that are compared as resolved paths


def check_run(
    directory: Path,
    settings: Mapping[str, Any],
    may_change: set[str],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a directory that a run cannot use, without writing anything.

    Args:
        directory: New, empty, with nothing but encoded data, or holding a run.
        settings: Settings of the new run, nested JSON values.
        may_change: Names of settings that may differ in a resumed run.
        defaults: JSON values of the settings that an earlier run may not state.

    Raises:
        ValueError: the directory holds something else, or a run of other settings or damaged.
    """
    stated = stated_settings(directory)
    if stated is not None:
        refuse_changes(directory, {**flat(defaults or {}), **flat(stated)}, settings, may_change)
    elif directory.is_dir() and not is_new(directory):
        raise ValueError(f"output_dir must be empty or hold a run, got {directory}")
    elif directory.exists() and not directory.is_dir():
        raise ValueError(f"output_dir must be a directory, got the file {directory}")
    parent = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise ValueError(f"output_dir must be in a directory, got the file {parent}")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"output_dir must be writable, got {directory}")


def is_new(directory: Path) -> bool:
    """Whether a directory holds nothing but what a run leaves that was killed as it began."""
    found = [path for path in directory.iterdir() if not is_left_over(path)]
    return {path.name for path in found} <= {DATA_DIR, LOCK_FILE}


@contextmanager
def only_run(directory: Path) -> Iterator[None]:
    """Be the only run that writes to a directory; leave nothing of one that is refused.

    What a killed run had not finished is removed.

    Raises:
        ValueError: Another run writes to the directory.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    make_directory(directory)
    try:
        with locked(directory):
            for part in ("", "checkpoints", "model", "samples"):
                remove_left_overs(directory / part)
            yield
    finally:
        for path in made:
            with suppress(OSError):  # there is something in it
                path.rmdir()


def claim_run(directory: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run."""
    make_directory(directory)
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    write_file(directory / "config.json", lambda beside: beside.write_text(text, "utf-8"))


def refuse_changes(
    directory: Path, before: Mapping[str, Any], now: Mapping[str, Any], may_change: set[str]
) -> None:
    """Refuse to resume a run under other settings, naming each."""
    old, new = flat(before), flat(now)
    changed = [
        f"{FLAGS.get(name, name)} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if name.split(".")[-1] not in {*may_change, "data_digest"}
        and not is_same(name, old.get(name), new.get(name))
    ]
    if "data_digest" not in may_change and old.get("data_digest") != new.get("data_digest"):
        changed.append(f"data was {old.get('data')!r}, now {new.get('data')!r} with other images")
    if changed:
        more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            f"output_dir must hold a run of this configuration, got {directory}: "
            + "; ".join(changed[:3])
            + more
        )


def is_same(name: str, old: Any, new: Any) -> bool:
    """Whether a setting is unchanged; a path may be spelled in another way."""
    if name in PLACES and isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(partial(is_same, name), old, new))
    if name in PLACES and isinstance(old, str) and isinstance(new, str):
        return old == new or Path(old).resolve() == Path(new).resolve()
    return bool(old == new)


def location(name: str) -> str:
    """Return the resolved path of a file or directory that exists; other names as they are."""
    path = Path(name)
    return str(path.resolve()) if path.exists() else name


def stated_settings(directory: Path) -> dict[str, Any] | None:
    """Return the settings of an earlier run, None for a new one."""
    path = directory / "config.json"
    if not path.is_file():
        return None
    stated = json_object(path)
    optimizer = stated.get("optimizer")
    if isinstance(optimizer, dict) and optimizer.get("algorithm") == "muon":
        # Before AdamW had a rate of its own, it had Muon's.
        optimizer.setdefault("adamw_learning_rate", optimizer.get("learning_rate"))
    return stated


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return found


def append_metrics(directory: Path, row: Mapping[str, Any], file: str = METRICS_FILE) -> None:
    """Add a line to `metrics.jsonl`, or to another such file."""
    with (directory / file).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({name: strict(value) for name, value in row.items()}) + "\n")


def strict(value: Any) -> Any:
    """Return a value for strict JSON, where numbers that are not finite are null."""
    if isinstance(value, list):
        return [strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync_metrics(directory: Path) -> None:
    """Wait until `metrics.jsonl` and `coefficients.jsonl` are on the disk."""
    for file in (METRICS_FILE, COEFFICIENTS_FILE):
        if (directory / file).exists():
            sync(directory / file)


def read_metrics(directory: Path, file: str = METRICS_FILE) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`, or of another such file; not one that a crash cut short.

    Other lines that are damaged are left out with a warning.
    """
    path = directory / file
    if not path.is_file():
        return []
    lines = path.read_text("utf-8", errors="replace").split("\n")[:-1]
    rows = [(number, row_of(line)) for number, line in enumerate(lines, start=1)]
    damaged = [number for number, row in rows if row is None]
    if damaged:
        logger.warning(
            "%s: %d of %d lines are damaged and left out, such as line %d",
            *(path, len(damaged), len(rows), damaged[0]),
        )
    return [row for _, row in rows if row is not None]


def row_of(line: str) -> dict[str, Any] | None:
    """Return a line of metrics, None if it is damaged."""
    with suppress(ValueError, RecursionError):
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return None


def cut_metrics(directory: Path, step: int, file: str = METRICS_FILE) -> None:
    """Drop the lines of `metrics.jsonl`, or of another such file, after a run's checkpoint."""
    rows = [row for row in read_metrics(directory, file) if row["step"] <= step]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_file(directory / file, lambda beside: beside.write_text(text, "utf-8"))
