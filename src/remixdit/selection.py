"""Which parameters of a network are mixed, by name."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

__all__ = ["MIXED", "block_of", "mixed_names", "tied_names"]

# What to mix, by name: patterns of parameter names.
MIXED = {
    # The linears of every block, as the published code does.
    "attention+mlp": ("*blocks.*.attn*.*", "*blocks.*.mlp.*", "*blocks.*.ff.*"),
    # Every parameter, as the published tables count.
    "all": ("*",),
}


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


def mixed_names(network: nn.Module, patterns: Sequence[str], tied: dict[str, str]) -> set[str]:
    """Return the (first) names of the parameters to mix."""

    def matches(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    for name, first in tied.items():
        if matches(name) != matches(first):
            raise ValueError(
                f"mixed must match all names of a tied parameter or none, got {first} and {name}"
            )
    return {name for name, _ in network.named_parameters() if matches(name)}
