"""The weights of a given model, for other data, labels or experts than it was trained with.

The bases of a mixture stay as they are. Its table is resampled over the new intervals: the logits
of a new expert are those of the old ones, in proportion to what they own of its interval. So
experts that only cut the old intervals finer start as exactly the same function.

Shapes: K bases, N experts before, M experts after.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from remixdit.diffusion.dit import DiT, DiTConfig
from remixdit.diffusion.intervals import Intervals
from remixdit.model.config import RemixConfig
from remixdit.model.model import RemixDiT

__all__ = [
    "adapted",
    "carried_weights",
    "refuse_other_mixture",
    "refuse_other_network",
    "resampled",
    "resampling_remark",
]

LABEL_TABLE = "y_embedder.embedding_table.weight"
OF_THE_DATA = {"input_size", "num_classes"}  # fields of a network that follow the data


def adapted(network: DiT, shape: DiTConfig, labels: Sequence[int] | None, seed: int) -> DiT:
    """Return a pre-trained DiT for other data.

    Args:
        network: The DiT.
        shape: Shape of the result, of another input size or number of classes.
        labels: Rows of the class embedding, one for each class and the null label; None to draw a
            new embedding.
        seed: Seed of the new embedding.
    """
    found = DiT(shape, seed)
    weights = dict(network.state_dict())
    table = weights.pop(LABEL_TABLE, None)
    if table is not None and labels is not None:
        weights[LABEL_TABLE] = table[list(labels)]
    found.load_state_dict(weights, strict=False)
    return found


def carried_weights(
    given: RemixDiT, target: RemixConfig, labels: Sequence[int] | None, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a mixture for other data or another number of experts.

    Args:
        given: The mixture.
        target: Configuration of the result.
        labels: Rows of the class embedding, as for `adapted`.
        seed: Seed of a new class embedding.
    """
    own = given.weights()
    for key, name in RemixDiT.empty(target).experts.disk_names().items():
        if name == "logits":
            yield name, resampled(own[name], given.intervals, target.intervals())
        elif key != LABEL_TABLE:
            yield name, own[name]
        elif labels is not None:
            yield name, own[name][..., list(labels), :]  # (K, C + 1, D) or (C + 1, D)
        else:
            table = DiT(target.network, seed).state_dict()[LABEL_TABLE]
            yield name, table.expand(target.num_bases, *table.shape) if is_basis(name) else table


def is_basis(name: str) -> bool:
    """Whether a weight has a basis axis, by its name on disk."""
    return name.startswith("bases.")


def resampled(table: Tensor, before: Intervals, after: Intervals) -> Tensor:
    """Return the table of other intervals.

    Args:
        table: (..., N, K) logits.
        before: N intervals.
        after: M intervals of the same timesteps.

    Returns:
        (..., M, K) logits: means over each interval.
    """
    if before.boundaries == after.boundaries:
        return table
    starts, ends = (torch.tensor(before.boundaries[s], dtype=torch.float64) for s in CUTS)
    lows, highs = (torch.tensor(after.boundaries[s], dtype=torch.float64)[:, None] for s in CUTS)
    overlap = (torch.minimum(ends, highs) - torch.maximum(starts, lows)).clamp(min=0)  # (M, N)
    shares = overlap / overlap.sum(1, keepdim=True)
    return (shares @ table.double()).to(table.dtype)


CUTS = (slice(None, -1), slice(1, None))  # the starts of intervals among their boundaries, the ends


def refuse_other_network(given: RemixConfig, target: RemixConfig) -> None:
    """Refuse data or an objective that need a network of another shape."""
    own, asked = asdict(given.network), asdict(target.network)
    refuse_differences(
        {name: (value, asked[name]) for name, value in own.items() if name not in OF_THE_DATA}
    )


def refuse_other_mixture(given: RemixConfig, target: RemixConfig) -> None:
    """Refuse to train a mixture under settings of another."""
    names = ["num_bases", "mixed", "coefficients", "per_block", "rank"]
    if given.coefficients == "one_hot":  # a table that is not learned cannot be shared out
        names += ["num_experts", "boundaries"]
    refuse_differences({name: (getattr(given, name), getattr(target, name)) for name in names})


def refuse_differences(pairs: dict[str, tuple[object, object]]) -> None:
    """Refuse the first of some settings that is not that of the model to start from."""
    for name, (own, asked) in pairs.items():
        if own != asked:
            raise ValueError(f"{name} must be that of --from, {own}, got {asked}")


def resampling_remark(given: RemixConfig, target: RemixConfig) -> str:
    """Return a line for a mixture whose number of experts changes, "" if it does not."""
    if given.num_experts == target.num_experts:
        return ""
    return (
        f"the coefficients of the {given.num_experts} experts of --from are resampled to "
        f"{target.num_experts}; --num-experts {given.num_experts} keeps them"
    )
