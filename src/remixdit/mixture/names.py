"""Which parameters of a network are mixed, by name."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

__all__ = ["block_of", "kinds_of", "matches", "patterns_of", "tied_names"]

# What to mix, by name: patterns of parameter names.
MIXED = {
    # The linears of every block, as the published code does.
    "attention+mlp": ("*blocks.*.attn*.*", "*blocks.*.mlp.*", "*blocks.*.ff.*"),
    # Every parameter, as the published tables count.
    "all": ("*",),
}


def patterns_of(mixed: str | Sequence[str]) -> tuple[str, ...]:
    """Return the patterns of parameter names that a user's choice stands for."""
    if isinstance(mixed, str):
        return MIXED.get(mixed) or tuple(mixed.split(","))
    return tuple(mixed)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter's name fits one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def kinds_of(names: Iterable[str], most: int = 12) -> str:
    """Return parameter names with a star for each number, for an error; at most so many."""
    kinds = list(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name) for name in names))
    more = f" and {len(kinds) - most} kinds more" if len(kinds) > most else ""
    return ", ".join(kinds[:most]) + more


def block_of(name: str) -> int:
    """Return the index of the block that a parameter belongs to, -1 outside the blocks."""
    found = re.search(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else -1


def tied_names(network: nn.Module) -> dict[str, str]:
    """Return, for every further name of a tied parameter, its first name."""
    first: dict[nn.Parameter, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            tied[name] = first[parameter]
    return tied
