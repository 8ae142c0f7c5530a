"""Values that cannot be had, and why.

A function that cannot measure raises `LeftOut`. A table of results holds what `measured` returns:

    {"value": 1.5, ...}    or    {"value": None, "left_out": "needs at least 3 images, got 2"}
"""

from collections.abc import Callable
from typing import Any

__all__ = ["LeftOut", "measured"]


class LeftOut(Exception):  # noqa: N818  not an error: the other results of the table stand
    """A value cannot be had.

    Args:
        reason: Why not, as the table of results says it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def measured(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what is measured, or the reason why it is left out."""
    try:
        return measure()
    except LeftOut as left_out:
        return {"value": None, "left_out": left_out.reason}
