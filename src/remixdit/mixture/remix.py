"""Turn chosen layers of any network into layers that hold K bases.

    experts = remix(network, num_bases=4, num_experts=20)
    with experts.route(expert_of_image):
        outputs = network(inputs)

Chosen layers are replaced in place; all else stays. Any optimizer, DDP, FSDP2, torch.compile and
activation checkpointing work as they do for any module.
"""

from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from remixdit.mixture.coefficients import KINDS, check_counts
from remixdit.mixture.experts import Experts
from remixdit.mixture.layers import MixedLayer, is_plain_linear
from remixdit.mixture.low_rank import LowRankLinear, initial_pair
from remixdit.mixture.names import block_of, kinds_of, matches, patterns_of, tied_names

__all__ = ["remix"]

# Layers that use the parameters of their children, so that they are mixed as a whole.
WHOLE = (nn.MultiheadAttention,)


def remix(  # noqa: PLR0913
    network: nn.Module,
    num_bases: int,
    num_experts: int,
    *,
    mixed: str | Sequence[str] = "attention+mlp",
    coefficients: str = "softmax",
    per_block: bool = False,
    symmetry: float = 2.0,
    rank: int = 0,
) -> Experts:
    """Give a network N experts, mixed from K bases that start as copies of its weights.

    Linears run all experts of a batch in one product, other layers expert by expert. Frozen
    parameters and buffers stay shared by all experts. Tied parameters stay tied.

    With a rank the network is frozen, and K low-rank bases are added to each linear that `mixed`
    names: a fraction of the memory to train, and experts that differ less.

    Args:
        network: Network that is changed in place: parameters that `mixed` names become (K, *).
        num_bases: Number of bases, K; in 1..N.
        num_experts: Number of experts, N; at least 1.
        mixed: "attention+mlp", "all", or patterns of parameter names ("*.mlp.*"), as a sequence or
            separated by commas.
        coefficients: "softmax" (learned, positive, summing to 1), "raw" (learned, free) or
            "one_hot" (frozen: expert n is basis floor(n K / N)).
        per_block: Whether each block has a table of its own, and the rest another.
        symmetry: Preference of expert n for its own basis floor(n K / N) at the start; with 0,
            equal bases would stay equal for ever.
        rank: Rank of the bases, added to the weights of linears; 0 for whole matrices.

    Returns:
        The experts, which are also the child `experts` of the network.

    Raises:
        ValueError: Nothing matches, or a parameter that matches cannot be mixed.
    """
    check_counts(num_bases, num_experts)
    if coefficients not in KINDS:
        raise ValueError(f"coefficients must be one of {', '.join(KINDS)}, got {coefficients!r}")
    if hasattr(network, "experts"):
        raise ValueError("network must not have experts of its own, such as of an earlier remix")
    names = chosen_names(network, patterns_of(mixed))
    if rank:
        names = linear_weights(network, names, rank)
    layers = list(owners(network, names))  # refuses before anything is changed
    num_tables = max(block_of(name) for name in names) + 2 if per_block else 0
    experts = Experts(network, num_bases, num_experts, coefficients, num_tables, symmetry)
    if rank:
        network.requires_grad_(False)
        add_low_rank(layers, experts, rank)
    else:
        stack(layers, names, experts)
    network.experts = experts
    return experts


def stack(layers: Sequence[tuple[str, nn.Module]], names: set[str], experts: Experts) -> None:
    """Put mixed layers in the place of the given ones; what is tied stays tied."""
    num_tables = len(experts.logits) if experts.per_block else 1
    stacked: dict[int, nn.Parameter] = {}  # bases by the parameter that they are copies of
    for name, layer in layers:
        own = {n: p for n, p in layer.named_parameters() if f"{name}.{n}" in names}
        for parameter in own.values():
            if id(parameter) not in stacked:
                stacked[id(parameter)] = copies(parameter, experts.num_bases)
        bases = {n: stacked[id(parameter)] for n, parameter in own.items()}
        table = block_of(name + ".") % num_tables  # -1 is the last
        replace(experts.network, layer, MixedLayer(layer, bases, experts, table))
        experts.mixed[name] = tuple(own)


def add_low_rank(layers: Sequence[tuple[str, nn.Module]], experts: Experts, rank: int) -> None:
    """Put linears with low-rank bases in the place of the given ones."""
    num_tables = len(experts.logits) if experts.per_block else 1
    for name, layer in layers:
        assert isinstance(layer, nn.Linear)
        pair = initial_pair(name, layer, experts.num_bases, rank)
        table = block_of(name + ".") % num_tables  # -1 is the last
        replace(experts.network, layer, LowRankLinear(layer, pair, experts, table))
        experts.mixed[name] = ("down", "up")


def copies(parameter: nn.Parameter, num_bases: int) -> nn.Parameter:
    """Return K copies of a parameter: (K, *)."""
    return nn.Parameter(parameter.detach().expand(num_bases, *parameter.shape).clone())


def chosen_names(network: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Return the names of the parameters to mix; of tied ones, all names."""
    tied = tied_names(network)
    named = dict(network.named_parameters(remove_duplicate=False))
    trainable = [name for name, parameter in named.items() if parameter.requires_grad]
    chosen = {name for name in trainable if matches(name, patterns)}
    for name, first in tied.items():
        if (name in chosen) != (first in chosen):
            raise ValueError(
                f"mixed must match all names of a tied parameter or none, got {first} and {name}"
            )
    if not chosen:
        raise ValueError(
            f"mixed must match a trainable parameter, got {', '.join(patterns)}; "
            f"this {type(network).__name__} has {kinds_of(trainable)}"
        )
    return chosen


def linear_weights(network: nn.Module, names: set[str], rank: int) -> set[str]:
    """Return those of the names that are weights of linears, to which bases can be added."""
    if rank < 0:
        raise ValueError(f"rank must be at least 0, got {rank}")
    tied = tied_names(network)
    found = set()
    for name in names:
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and is_plain_linear(network.get_submodule(owner)):
            if name in tied or name in tied.values():
                raise ValueError(f"mixed must not match a tied parameter with a rank, got {name}")
            found.add(name)
    if not found:
        raise ValueError(
            f"mixed must match the weight of a linear with a rank, got {kinds_of(sorted(names))}"
        )
    return found


def owners(network: nn.Module, names: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that hold the parameters to mix, with their names."""
    whole: tuple[str, ...] = ()
    for name, layer in list(network.named_modules()):
        if name.startswith(whole):
            continue
        is_whole = isinstance(layer, WHOLE)
        prefix = f"{name}." if name else ""
        own = {prefix + n for n, _ in layer.named_parameters(recurse=is_whole)} & names
        if is_whole:
            whole += (prefix,)
        if own:
            check_layer(name, layer, min(own))
            yield name, layer


def replace(network: nn.Module, layer: nn.Module, mixed: nn.Module) -> None:
    """Put a layer in the place of another, wherever the other is used."""
    for parent in list(network.modules()):
        for name, child in parent._modules.items():  # named_children leaves out the second use
            if child is layer:
                parent._modules[name] = mixed


def check_layer(name: str, layer: nn.Module, first: str) -> None:
    """Refuse a layer that cannot run expert by expert; `first` is one of its parameters."""
    if not name:
        raise ValueError(f"mixed must not match {first}, which belongs to the network itself")
    if ".parametrizations." in f".{name}." or is_parametrized(layer):
        raise ValueError(f"mixed must not match {first}, which is parametrized")
    if any(True for _ in layer.children()) and not isinstance(layer, WHOLE):
        raise ValueError(
            f"mixed must match parameters of layers only, got {first} of {name}, a "
            f"{type(layer).__name__} with layers of its own: leave it out by narrower patterns"
        )
    if getattr(layer, "batch_first", True) is False:
        raise ValueError(f"{name}, to be mixed, must have batch_first True, got False")
