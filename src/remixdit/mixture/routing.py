"""The expert of each image of a batch, and the order in which images run.

Shapes: B images, N experts, M of them in a batch, L coefficient tables, K bases.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from remixdit.mixture.product import Span

__all__ = ["Batch", "sorted_by_expert"]


class Batch(NamedTuple):
    """The images of a batch, grouped by expert."""

    experts: Tensor
    """(M,) distinct experts, on the device."""
    spans: tuple[Span, ...]
    """Numbers of images of the experts, in their order."""
    order: Tensor | None
    """(B,) indices of the images, expert by expert; None if they are given in that order."""
    inverse: Tensor | None
    """(B,) place of each image in that order."""
    coefficients: Tensor | None = None
    """(L, M, K), differentiable with respect to the logits; computed when the network runs."""

    def rows(self, table: int) -> Tensor:
        """Return the (M, K) coefficients of one table."""
        assert self.coefficients is not None
        return self.coefficients[table]

    def rows_of_images(self, table: int) -> Tensor:
        """Return the (B, K) coefficients of the images, in the order in which they are given."""
        parts, first = [], 0
        for experts, size in self.spans:
            rows = self.rows(table)[first : first + experts]
            parts.append(rows.repeat_interleave(size, 0))
            first += experts
        ordered = torch.cat(parts)
        return ordered if self.inverse is None else ordered[self.inverse]

    def images(self, values: Tensor) -> int:
        """Return B, which divides the first dimension of a layer's input."""
        count = sum(experts * size for experts, size in self.spans)
        if len(values) % count:
            raise ValueError(
                f"a mixed layer must be given rows of each of the {count} images that "
                f"experts.route was told of, got {tuple(values.shape)}"
            )
        return count

    def slices(self) -> Iterator[slice]:
        """Yield the slice of each expert's images among the ordered ones."""
        start = 0
        for experts, size in self.spans:
            for _ in range(experts):
                yield slice(start, start + size)
                start += size


def sorted_by_expert(given: Tensor, num_experts: int, device: torch.device) -> Batch:
    """Return a batch grouped by expert.

    Args:
        given: (B,) experts of the images, integers in [0, N), on the CPU, in any order.
        num_experts: Number of experts, N.
        device: Device of the layers.
    """
    check_given(given, num_experts)
    order = inverse = None
    experts, counts = given.unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
    if len(experts.unique()) < len(experts):
        ordered, order = given.sort(stable=True)
        inverse, order = sent(order.argsort(), device), sent(order, device)
        experts, counts = ordered.unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
    spans = tuple((len(list(equal)), size) for size, equal in groupby(counts.tolist()))
    return Batch(sent(experts.long(), device), spans, order, inverse)


def check_given(given: Tensor, num_experts: int) -> None:
    """Refuse values that cannot be the experts of images."""
    if given.ndim != 1 or not len(given) or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(
            f"expert_of_image must be (B,) integers, got {tuple(given.shape)} {given.dtype}"
        )
    if given.device.type != "cpu":
        raise ValueError(f"expert_of_image must be on the CPU, got {given.device}")
    least, most = int(given.min()), int(given.max())
    if least < 0 or most >= num_experts:
        raise ValueError(f"expert_of_image must be in [0, {num_experts}), got {least} to {most}")


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Return CPU values on a device, without synchronising with it."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
