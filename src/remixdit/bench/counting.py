"""The parameters of a model and the experts of a micro-batch, counted.

Shapes: K bases, M experts of a step, G processes that share one copy of the state.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from remixdit.mixture.layers import MixedLayer
from remixdit.mixture.names import block_of
from remixdit.model.model import RemixDiT
from remixdit.training.config import TrainConfig
from remixdit.training.muon import matrix_shape
from remixdit.training.optimizer import matrices_of

__all__ = ["Counted", "counted", "mixed_at_once", "mixed_bytes", "mixed_per_step"]


class Counted(NamedTuple):
    """One parameter, in numbers."""

    name: str
    numbers: int
    """All of them, of all K bases."""
    own: int
    """Those of the first of G processes."""
    block: int
    """Index of its block, -1 outside the blocks."""
    is_mixed: bool
    """Whether experts are mixed from it."""
    is_trained: bool
    is_cast: bool
    """Whether autocast makes a copy in the precision of the arithmetic."""
    matrix: tuple[int, int] | None
    """(O, I) of its matrices if Muon can move it."""


def counted(model: RemixDiT, size: int, precision: torch.dtype) -> list[Counted]:
    """Count the parameters of a model, which needs no storage.

    Args:
        model: Any.
        size: G.
        precision: Precision of the arithmetic.
    """
    is_mixing = model.experts.is_mixing and not model.config.rank  # low-rank bases never are
    bases = model.experts.bases() if is_mixing else {}
    matrices = matrices_of(model.experts)
    stacked = {id(parameter) for parameter in model.experts.bases().values()}
    exact = (*model.network.float32_modules, "experts")
    return [
        Counted(
            name,
            parameter.numel(),
            own_numbers(parameter.shape, id(parameter) in stacked, size),
            block_of(name),
            name in bases,
            parameter.requires_grad,
            precision != torch.float32
            and name not in bases
            and not any(part in exact for part in name.split(".")),
            matrix_shape(name, parameter.shape) if parameter in matrices else None,
        )
        for name, parameter in model.network.named_parameters()
    ]


def own_numbers(shape: Sequence[int], is_bases: bool, size: int) -> int:
    """Return how many numbers of a parameter the first of G processes holds.

    The cut is that of `distributed.parallel.shard`: bases along the first dimension after K that G
    divides, everything else along the first, where the last process may have less.
    """
    divided = (d for d in range(1, len(shape)) if shape[d] % size == 0)
    cut = next(divided, 0) if is_bases else 0
    numbers = 1
    for dimension, length in enumerate(shape):
        numbers *= -(-length // size) if dimension == cut else length
    return numbers


def mixed_per_step(config: TrainConfig, images: int) -> list[int]:
    """Return how many experts each micro-batch of a step holds, on the first process.

    Image i belongs to group i mod M, and images are sorted by group.
    """
    groups = sorted(image % config.strata_per_step for image in range(images))
    size = config.micro_batch_size or images
    return [len(set(groups[start : start + size])) for start in range(0, images, size)]


def mixed_at_once(model: RemixDiT, config: TrainConfig, images: int) -> int:
    """Return the bytes of mixed weights, and of their gradients, that exist at once.

    The layer with the most decides: a linear has all experts of a micro-batch, another layer one
    expert at a time. Weights or their gradients exist, not both; a bfloat16 gradient is converted
    to float32 beside itself. Where M does not divide the batch, gradients are copied once more.
    """
    if not model.experts.is_mixing:
        return 0
    experts = max(mixed_per_step(config, images))
    largest = 0
    for name in model.experts.mixed:
        layer = model.network.get_submodule(name)
        if not isinstance(layer, MixedLayer):
            continue  # low-rank bases are applied one after the other, not mixed
        numbers = sum(layer.get_parameter(own).numel() for own in layer.mixed)
        largest = max(largest, numbers // model.num_bases * (experts if layer.is_linear else 1))
    return largest * mixed_bytes(config.precision)


def mixed_bytes(precision: str) -> int:
    """Return the bytes for each number of the mixed weights of a layer, when they are most."""
    return 6 if precision == "bf16" else 4  # 2 of the gradient and 4 of its float32; or 4
