"""Metrics against values known by hand, for users to run on their own machine and device."""

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from remixdit.evaluation.metrics.classes import inception_score, linear_probe_accuracy
from remixdit.evaluation.metrics.gaussians import Moments, frechet_distance, gaussian
from remixdit.evaluation.metrics.kernels import kernel_distance, kernel_distance_subsets
from remixdit.evaluation.metrics.neighbours import (
    memorisation,
    nearest_neighbours,
    precision_recall,
)

__all__ = ["Check", "self_test"]

logger = logging.getLogger(__name__)


class Check(NamedTuple):
    """One row of the table that `self_test` returns."""

    name: str
    expected: float
    got: float  # nan when the computation failed; the log says why
    tolerance: float = 1e-6

    @property
    def passed(self) -> bool:
        """Whether what came out is what is known."""
        return abs(self.got - self.expected) <= self.tolerance


def self_test(device: torch.device | str = "cpu") -> list[Check]:
    """Run every metric where its value is known; takes a second and raises nothing."""
    place = torch.device(device)
    return [Check(name, expected, _run(name, f, place)) for name, expected, f in _TABLE]


def _run(name: str, computation: Callable[[torch.device], float], place: torch.device) -> float:
    try:
        return float(computation(place))
    except (
        Exception
    ):  # no such device, no float64 on it, or a fault: a row of the table all the same
        logger.exception("%s failed", name)
        return math.nan


def _numbers(place: torch.device, *values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=place)[:, None]  # (B, 1)


def _waves(place: torch.device, count: int, size: int) -> Tensor:
    grid = torch.arange(1, count * size + 1, dtype=torch.float64, device=place)
    return (grid.square() * 0.7).sin().view(count, size)  # (B, F), without structure


def _moved_mean(place: torch.device) -> float:
    covariance, mean = torch.eye(2, device=place), torch.zeros(2, device=place)
    moved = torch.tensor([3.0, 4.0], device=place)
    return frechet_distance((mean, covariance), (moved, covariance))


def _other_deviation(place: torch.device) -> float:
    identity, mean = torch.eye(8, device=place), torch.zeros(8, device=place)
    return frechet_distance((mean, 4 * identity), (mean, 25 * identity))


def _not_commuting(place: torch.device) -> float:
    mean = torch.zeros(2, device=place)
    first = torch.tensor([[2.0, 1.0], [1.0, 2.0]], device=place)
    second = torch.tensor([[1.0, 0.0], [0.0, 4.0]], device=place)
    return frechet_distance((mean, first), (mean, second))


def _few_images(place: torch.device) -> float:
    low_rank = gaussian(_waves(place, 5, 16))
    return frechet_distance(low_rank, low_rank)


def _in_batches(place: torch.device) -> float:
    features, moments = _waves(place, 64, 6), Moments(6, place)
    for batch in features.tensor_split(7):
        moments.update(batch)
    return frechet_distance(moments.gaussian(), gaussian(features))


def _kernel(place: torch.device) -> float:
    return kernel_distance(_numbers(place, 0, 1, -1), _numbers(place, 0, 0, 2)).value


def _kernel_subset(place: torch.device) -> float:
    real, fake = _numbers(place, 0, 1, -1), _numbers(place, 0, 0, 2)
    return kernel_distance_subsets(real, fake, num_subsets=3, subset_size=3).mean


def _sure_classifier(place: torch.device) -> float:
    logits = 100 * torch.eye(7, device=place).repeat(4, 1)
    return inception_score(logits, num_splits=1).mean


def _precision(place: torch.device) -> float:
    real, fake = _numbers(place, 0, 1, 2, 3), _numbers(place, 0.5, 1.5, 2.5, 10)
    return precision_recall(real, fake, k=1).precision


def _recall(place: torch.device) -> float:
    real, fake = _numbers(place, 0, 1, 2, 3), _numbers(place, -0.5, 0.5, 20, 21)
    return precision_recall(real, fake, k=1).recall


def _probe(place: torch.device) -> float:
    class_labels = torch.arange(40, device=place) % 2
    features = _waves(place, 40, 3) + 4 * class_labels[:, None]
    return linear_probe_accuracy(features[:20], class_labels[:20], features[20:], class_labels[20:])


def _nearest(place: torch.device) -> float:
    distances, _ = nearest_neighbours(_numbers(place, 10), _numbers(place, 1, 5, 20))
    return float(distances)


def _copies(place: torch.device) -> float:
    train, held_out = _waves(place, 20, 4), _waves(place, 20, 4) + 10
    return memorisation(train, train, held_out).fraction_nearer_train.value


_TABLE: list[tuple[str, float, Callable[[torch.device], float]]] = [
    ("frechet: mean moved by (3, 4)", 25.0, _moved_mean),
    ("frechet: 8 features, deviation 2 against 5", 72.0, _other_deviation),
    # In two dimensions tr((C1 C2)^(1/2)) = (tr(C1 C2) + 2 det(C1 C2)^(1/2))^(1/2).
    ("frechet: two features, not commuting", 9 - 2 * (10 + 2 * 12**0.5) ** 0.5, _not_commuting),
    ("frechet: equal, fewer images than features", 0.0, _few_images),
    ("moments: in batches against at once", 0.0, _in_batches),
    ("kernel: three images each", -17 / 3, _kernel),
    ("kernel: subsets that hold all images", -17 / 3, _kernel_subset),
    ("inception score: sure of 7 classes", 7.0, _sure_classifier),
    ("precision: three of four inside", 0.75, _precision),
    ("recall: two of four inside", 0.5, _recall),
    ("linear probe: classes apart", 1.0, _probe),
    ("nearest neighbour: 10 among 1, 5, 20", 5.0, _nearest),
    ("memorisation: copies of train", 1.0, _copies),
]
