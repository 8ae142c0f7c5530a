"""Sets of features (B, F): what is asked of them, draws from them, and numbers with a spread."""

from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Estimate",
    "Spread",
    "check_features",
    "check_pair",
    "chunks",
    "draw",
    "real_floor",
    "spread",
]


class Estimate(NamedTuple):
    """A value, and the standard deviation that drawing other images would give it."""

    value: float
    standard_error: float

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the normal interval around the value."""
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
        reach = NormalDist().inv_cdf((1 + confidence) / 2) * self.standard_error
        return self.value - reach, self.value + reach


class Spread(NamedTuple):
    """Mean and standard deviation over splits, subsets or repeats; 0 when there is only one."""

    mean: float
    std: float


def real_floor(
    real: Tensor,
    num_images: int,
    distance: Callable[[Tensor, Tensor], float],
    *,
    num_reference: int | None = None,
    num_repeats: int = 5,
    seed: int = 0,
) -> Spread:
    """Return what a perfect generator would score: real images against other real images.

    Args:
        real: (B, F) features.
        num_images: Number of images that take the place of generated ones.
        distance: Called as distance(reference, images).
        num_reference: Number of the others that are the reference; by default all of them.
        num_repeats: Number of random divisions of `real`. They share images, so the deviation is
            a guide.
        seed: Seed for the divisions.
    """
    check_features("real", real, at_least=num_images + 1)
    num_reference = len(real) - num_images if num_reference is None else num_reference
    check_features("real", real, at_least=num_images + num_reference)
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(num_repeats):
        drawn = draw(real, num_images + num_reference, generator)
        scores.append(distance(drawn[num_images:], drawn[:num_images]))
    return spread(scores)


def draw(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` different rows in random order: the same ones on every device."""
    order = torch.randperm(len(features), generator=generator)[:count]
    return features[order.to(features.device)]


def chunks(features: Tensor, chunk_size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield where a chunk of rows starts, and the chunk."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    for start in range(0, len(features), chunk_size):
        yield start, features[start : start + chunk_size]


def spread(values: Sequence[float]) -> Spread:
    """Return the mean and the population deviation."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return Spread(float(numbers.mean()), float(numbers.std(correction=0)))


def check_features(field: str, features: Tensor, *, at_least: int = 1) -> None:
    """Refuse what is no finite matrix of enough rows."""
    if features.ndim != 2:
        raise ValueError(f"{field} must have the shape (B, F), got {tuple(features.shape)}")
    if len(features) < at_least:
        raise ValueError(f"{field} must hold at least {at_least} images, got {len(features)}")
    if not features.isfinite().all():
        bad = int((~features.isfinite()).any(1).sum())
        raise ValueError(f"{field} must be finite, got {bad} images with nan or inf")


def check_pair(real: Tensor, fake: Tensor, *, at_least: int) -> None:
    """Refuse two sets that cannot be compared."""
    check_features("real", real, at_least=at_least)
    check_features("fake", fake, at_least=at_least)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"fake must have the {real.shape[1]} features of real, got {fake.shape[1]}"
        )
