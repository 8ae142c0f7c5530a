"""Which parameters of a network are mixed, by name."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

__all__ = [
    "MIXED",
    "block_of",
    "grouped",
    "keeps_float32",
    "kinds_of",
    "matches",
    "mixed_names",
    "patterns_of",
    "tied_names",
]

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


def grouped(
    network: nn.Module, mixed: set[str], num_tables: int
) -> dict[tuple[int | None, torch.dtype, bool], dict[str, nn.Parameter]]:
    """Group the trainable parameters by what has to be equal for them to lie together.

    Args:
        network: Whose parameters.
        mixed: The names of those to mix.
        num_tables: Of coefficients: one for all, or one a block and the last for the rest.

    Returns:
        Parameters by (table or None for those not mixed, dtype, whether they stay float32).
    """
    groups: dict[tuple[int | None, torch.dtype, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            table = block_of(name) % num_tables if name in mixed else None  # -1 is the last
            group = (table, parameter.dtype, keeps_float32(network, name))
            groups.setdefault(group, {})[name] = parameter
    return groups


def keeps_float32(network: nn.Module, name: str) -> bool:
    """Whether a network asks for float32 for this parameter, by `float32_modules`."""
    kept = getattr(network, "float32_modules", ())
    return any(part in kept for part in name.split("."))
