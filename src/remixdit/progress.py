"""How far long work has come.

Work that takes long is a generator that yields `Progress` and returns its result:

    result = yield from work        inside of other work, whose progress it then is
    result = finish(work)           where nobody watches
"""

from collections.abc import Generator
from typing import NamedTuple, TypeVar

__all__ = ["Progress", "finish"]

Result = TypeVar("Result")


class Progress(NamedTuple):
    """How far one stage of some work has come."""

    stage: str
    """Name of what is being done; a new name begins a new stage."""
    done: int
    """Number of units done, out of `total`."""
    total: int
    """Number of units in this stage."""
    note: str = ""
    """Further facts to show, such as a loss."""


def finish(work: Generator[Progress, None, Result]) -> Result:
    """Run work to its end without showing its progress, and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value
