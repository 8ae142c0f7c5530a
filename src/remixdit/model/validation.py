"""JSON files that others may have written, checked against the dataclass that they describe.

An error is a ValueError of one sentence that names the field, the rule and the value.
"""

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

__all__ = ["brief", "check_fields", "fits", "json_object", "shown", "wanted"]

MAX_JSON_BYTES = 2**26  # as objects they take up to twenty times as much
MAX_TEXT = 10_000  # characters of a text
KINDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text"}


def json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path} must hold at most {MAX_JSON_BYTES:,} bytes, got {size:,}")
    text = path.read_text("utf-8", errors="replace")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must hold a JSON object, got {shown(text)}: {brief(error)}"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {shown(values)}")
    return values


def check_fields(
    kind: type,
    values: Any,
    place: str,
    *,
    required: set[str] | None = None,
    largest: Mapping[str, float] | None = None,
) -> None:
    """Refuse values that are no fields of a dataclass, or of another type or size than these.

    Args:
        kind: The dataclass.
        values: JSON values of its fields.
        place: What holds them, for an error.
        required: Fields that must be stated; by default those without a default.
        largest: Largest values of numbers, by field.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{place} must be an object, got {shown(values)}")
    known = {item.name: item for item in fields(kind)}
    unknown = sorted(map(shown, values.keys() - known.keys()))
    if unknown:
        raise ValueError(f"{place} must hold known fields only, got {', '.join(unknown[:5])}")
    if required is None:
        required = {
            name
            for name, item in known.items()
            if item.default is MISSING and item.default_factory is MISSING
        }
    missing = sorted(required - values.keys())
    if missing:
        raise ValueError(f"{place} must state {missing[0]}, got none")
    hints = get_type_hints(kind)
    for name, value in values.items():
        if not fits(hints[name], value):
            raise ValueError(f"{name} of {place} must be {wanted(hints[name])}, got {shown(value)}")
        most = (largest or {}).get(name, math.inf)
        if isinstance(value, int | float) and value > most:
            raise ValueError(f"{name} of {place} must be at most {most:,}, got {shown(value)}")


def fits(hint: Any, value: Any) -> bool:
    """Whether a JSON value is of the type that a field's annotation states."""
    parts = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(part, value) for part in parts)
    if get_origin(hint) is tuple:  # tuple[X, ...]
        return isinstance(value, list | tuple) and all(fits(parts[0], item) for item in value)
    if hint is float:
        return type(value) in (int, float) and -1e300 < value < 1e300
    if hint is str:
        return isinstance(value, str) and len(value) <= MAX_TEXT
    if hint in (int, bool, type(None)):
        return type(value) is hint
    return isinstance(value, Mapping)


def wanted(hint: Any) -> str:
    """Return what a field's annotation asks for, in words."""
    parts = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(wanted, parts)))
    if get_origin(hint) is tuple:
        return f"a list ({wanted(parts[0])} each)"
    return KINDS.get(hint, "null" if hint is type(None) else "an object")


def brief(error: Exception, most: int = 200) -> str:
    """Return an error of a library, which may repeat all of a forged file, short and printable."""
    text = "".join(letter if letter.isprintable() else "?" for letter in str(error))
    return text if len(text) <= most else f"{text[:most]}..."


def shown(value: Any, most: int = 40) -> str:
    """Return a value for an error: short, and of printable characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or lists in lists
        return f"a very large {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."
