"""Nearest neighbours among features: precision and recall, and whether samples are copies.

Shapes: B images, F features. Distances are Euclidean; inside this module they are squared.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from remixdit.evaluation.metrics.samples import Estimate, check_features, check_pair, chunks, draw

__all__ = [
    "Memorisation",
    "PrecisionRecall",
    "memorisation",
    "nearest_neighbours",
    "precision_recall",
]


class PrecisionRecall(NamedTuple):
    """Fractions in [0, 1], better when higher."""

    precision: float  # of the fake images inside a ball of the real ones
    recall: float  # of the real images inside a ball of the fake ones


def precision_recall(
    real: Tensor, fake: Tensor, *, k: int = 3, chunk_size: int = 2048
) -> PrecisionRecall:
    """Return improved precision and recall: compare at equal numbers of images.

    Args:
        real: (B, F) features, more than k images.
        fake: (B', F) features, more than k images.
        k: The ball around an image reaches to its k-th nearest neighbour, itself not counted.
        chunk_size: Rows of the distance matrix in memory at once.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    check_pair(real, fake, at_least=k + 1)
    real, fake = real.double(), fake.double()
    return PrecisionRecall(
        precision=_fraction_inside(fake, real, _ball_radii(real, k, chunk_size), chunk_size),
        recall=_fraction_inside(real, fake, _ball_radii(fake, k, chunk_size), chunk_size),
    )


def nearest_neighbours(
    samples: Tensor, references: Tensor, *, chunk_size: int = 2048
) -> tuple[Tensor, Tensor]:
    """Return the distance (B,) and the index (B,) of the nearest reference of each sample.

    Args:
        samples: (B, F) features.
        references: (B', F) features.
        chunk_size: Rows of the distance matrix in memory at once.
    """
    check_pair(references, samples, at_least=1)
    references, found = references.double(), []
    for _, chunk in chunks(samples.double(), chunk_size):
        found.append(_squared_distances(chunk, references).min(1))
    distances = torch.cat([nearest.values for nearest in found]).sqrt()
    return distances, torch.cat([nearest.indices for nearest in found])


class Memorisation(NamedTuple):
    """Whether samples lie nearer to the training images than to held-out ones."""

    fraction_nearer_train: Estimate  # 0.5 when nothing is memorised, 1 for copies; error: below
    median_to_train: float
    median_to_held_out: float


def memorisation(
    samples: Tensor, train: Tensor, held_out: Tensor, *, seed: int = 0
) -> Memorisation:
    """Compare the distances of samples to training and to held-out images.

    The nearest of many is nearer than the nearest of few, so the larger set is thinned to the
    size of the other. For copies of single images look at `nearest_neighbours` in all of train.

    The standard error is that of chance, were nothing memorised: any half of the images might
    then have been train. It minds how many samples share a nearest image, for in many dimensions
    a few images are nearest to most, and the fraction errs by more than a coin's 0.5 / B^(1/2).

    Args:
        samples: (B, F) features of generated images.
        train: (B', F) features.
        held_out: (B", F) features of images from the distribution of train, not in it.
        seed: Seed for the thinning.
    """
    check_features("samples", samples)
    check_pair(train, held_out, at_least=1)
    size = min(len(train), len(held_out))
    generator = torch.Generator().manual_seed(seed)
    to_train, train_index = nearest_neighbours(samples, draw(train, size, generator))
    to_held_out, held_out_index = nearest_neighbours(samples, draw(held_out, size, generator))
    nearer = 0.5 * ((to_train < to_held_out).double() + (to_train <= to_held_out).double())
    nearest = torch.where(to_train < to_held_out, train_index, held_out_index + size)
    shares = nearest.bincount(minlength=2 * size).double() / len(samples)  # of each image
    return Memorisation(
        Estimate(float(nearer.mean()), float(shares.std() * (2 * size) ** 0.5 / 2)),
        float(to_train.median()),
        float(to_held_out.median()),
    )


def _ball_radii(features: Tensor, k: int, chunk_size: int) -> Tensor:
    radii = []
    for start, chunk in chunks(features, chunk_size):
        distances = _squared_distances(chunk, features)
        distances.diagonal(start).fill_(torch.inf)  # an image is not its own neighbour
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)  # (B,) squared


def _fraction_inside(points: Tensor, centres: Tensor, radii: Tensor, chunk_size: int) -> float:
    inside = []
    for _, chunk in chunks(points, chunk_size):
        inside.append((_squared_distances(chunk, centres) <= radii).any(1))
    return float(torch.cat(inside).double().mean())


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    norms = rows.square().sum(1)[:, None] + columns.square().sum(1)  # (B, B')
    return norms.addmm_(rows, columns.T, alpha=-2).clamp_min_(0)
