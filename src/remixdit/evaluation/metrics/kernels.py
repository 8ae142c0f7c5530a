"""Kernel distance: the squared maximum mean discrepancy under a cubic kernel.

    distance = E k(x, x') + E k(y, y') - 2 E k(x, y),    k(x, y) = (x.y / F + 1)^3

Both expectations within a set leave out an image with itself, so the estimate has no bias at any
number of images, unlike the Fréchet distance; it can therefore be negative.

Shapes: B images, F features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from remixdit.evaluation.metrics.samples import Estimate, Spread, check_pair, chunks, draw, spread

__all__ = ["KernelDistance", "kernel_distance", "kernel_distance_subsets", "kernel_shifts"]


class KernelDistance(NamedTuple):
    """A kernel distance, and what each image contributes to its error."""

    value: float
    """The distance."""
    real_shifts: Tensor
    """(B,) by how much the distance moves when a real image is left out."""
    fake_shifts: Tensor
    """(B',) by how much it moves when another image is left out."""

    @property
    def standard_error(self) -> float:
        """Jackknife standard error over images."""
        return sum(map(_shift_variance, (self.real_shifts, self.fake_shifts))) ** 0.5


def kernel_distance(real: Tensor, fake: Tensor, *, chunk_size: int = 2048) -> Estimate:
    """Return the kernel distance over all pairs of images, with its jackknife standard error.

    The published mean over random subsets tends to this value; here nothing is drawn.

    Args:
        real: (B, F) features, at least 3 images.
        fake: (B', F) features, at least 3 images.
        chunk_size: Rows of the kernel matrix in memory at once.
    """
    found = kernel_shifts(real, fake, chunk_size=chunk_size)
    return Estimate(found.value, found.standard_error)


def kernel_shifts(real: Tensor, fake: Tensor, *, chunk_size: int = 2048) -> KernelDistance:
    """Return the kernel distance over all pairs of images, and the shift of each image.

    Two sets of images that were drawn from the same noise are compared image by image: the error
    of the difference of their distances is that of the differences of their shifts.

    Args:
        real: (B, F) features, at least 3 images.
        fake: (B', F) features, at least 3 images.
        chunk_size: Rows of the kernel matrix in memory at once.
    """
    check_pair(real, fake, at_least=3)
    real, fake = real.double(), fake.double()
    real_within = _kernel_sums(real, real, chunk_size)[0] - _diagonal(real)  # (B,)
    fake_within = _kernel_sums(fake, fake, chunk_size)[0] - _diagonal(fake)  # (B',)
    real_sums, fake_sums = _kernel_sums(real, fake, chunk_size)
    real_means, fake_means = real_sums / len(fake), fake_sums / len(real)  # (B,), (B',)
    value = _pair_mean(real_within) + _pair_mean(fake_within) - 2 * real_means.mean()
    shifts = _shifts(real_within, real_means), _shifts(fake_within, fake_means)
    return KernelDistance(float(value), *shifts)


def kernel_distance_subsets(
    real: Tensor, fake: Tensor, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Spread:
    """Return the kernel distance as published: mean and deviation over random subsets.

    The deviation is that of one subset, and no standard error: the subsets share images.

    Args:
        real: (B, F) features, at least `subset_size` images.
        fake: (B', F) features, at least `subset_size` images.
        num_subsets: Number of pairs of subsets.
        subset_size: Number of images in each, at least 3.
        seed: Seed for the subsets.
    """
    check_pair(real, fake, at_least=max(subset_size, 3))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(num_subsets):
        subsets = draw(real, subset_size, generator), draw(fake, subset_size, generator)
        values.append(kernel_distance(*subsets).value)
    return spread(values)


def _kernel_sums(rows: Tensor, columns: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    row_sums, column_sums = [], columns.new_zeros(len(columns))
    for _, chunk in chunks(rows, chunk_size):
        kernel = (chunk @ columns.T / rows.shape[1] + 1).pow_(3)  # (chunk, B')
        row_sums.append(kernel.sum(1))
        column_sums += kernel.sum(0)
    return torch.cat(row_sums), column_sums


def _diagonal(features: Tensor) -> Tensor:
    return (features.square().sum(1) / features.shape[1] + 1).pow(3)


def _pair_mean(within: Tensor) -> Tensor:
    return within.sum() / (len(within) * (len(within) - 1))


def _shifts(within: Tensor, means: Tensor) -> Tensor:
    # Leaving image i out moves the estimate by 2 / (B - 1) times this, less its mean over i.
    count = len(within)
    influence = means - within / (count - 2)
    return 2 / (count - 1) * (influence - influence.mean())


def _shift_variance(shifts: Tensor) -> float:
    count = len(shifts)
    return float((count - 1) / count * shifts.square().sum())
