"""Features of two sets of images => every score that they allow, each with its error and floor.

    real = reference_features(open_source("photos", "test"), extractor)
    fake = image_features(batches, extractor)
    scores(real, fake, extractor.name)["KID-lite0"]["value"]

A score that cannot be had says why: `{"value": None, "left_out": "..."}`. Beside each stands what
real images score against others at the same number ("real"), where there are enough of them.

Shapes: n images under test, R real ones, F features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from remixdit.evaluation.feature_sets import FeatureSet
from remixdit.evaluation.features import Reference, metric_name
from remixdit.evaluation.left_out import LeftOut, measured
from remixdit.evaluation.metrics import (
    frechet_distance,
    gaussian,
    inception_score,
    jackknife_frechet,
    kernel_distance,
    precision_recall,
    real_floor,
)
from remixdit.evaluation.metrics.samples import draw

__all__ = ["scores"]

NEIGHBOURS = 3  # k of precision and recall, as published
NUM_GROUPS = 20  # of the jackknife
NUM_FLOORS = 3  # random divisions of the real images
NUM_SPLITS = 10  # of the inception score, as published

Score = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two sets of images under comparison."""

    real: FeatureSet | None
    """Features of R real images; None if only their statistics are known."""
    fake: FeatureSet
    """Features of n images under test."""
    statistics: Reference | None
    extractor_name: str
    seed: int
    with_floor: bool

    def pools(self, least: int) -> tuple[Tensor, Tensor]:
        """Return the features (R, F) and (n, F), of at least so many images each."""
        if self.real is None:
            raise LeftOut("needs images of the reference, which holds statistics only")
        real, fake = self.real.pool, self.fake.pool
        require(least, ("under test", len(fake)), ("of the reference", len(real)))
        return real, fake

    @cached_property
    def precision_recall(self) -> tuple[int, tuple[float, float]]:
        """Return the number of images of each set, and both values at it.

        The larger set is thinned, for the values depend on the numbers.
        """
        real, fake = self.pools(NEIGHBOURS + 1)
        size = min(len(real), len(fake))
        generator = torch.Generator().manual_seed(self.seed)
        thinned = draw(real, size, generator), draw(fake, size, generator)
        return size, precision_recall(*thinned, k=NEIGHBOURS)


def scores(
    real: FeatureSet | None,
    fake: FeatureSet,
    extractor_name: str,
    *,
    statistics: Reference | None = None,
    seed: int = 0,
    with_floor: bool = True,
) -> dict[str, Score]:
    """Return every score by its name, with "value" None and "left_out" where it cannot be had.

    Args:
        real: Features of R real images; None if only their statistics are known.
        fake: Features of n images under test.
        extractor_name: `Extractor.name` of both.
        statistics: Mean and covariance of more real images; the Fréchet distances are to them.
        seed: Seed for groups of the jackknife, subsets of equal size and divisions of `real`.
        with_floor: Score real images against others too; takes several times as long.
    """
    pair = Pair(real, fake, statistics, extractor_name, seed, with_floor)
    return {
        metric_name(name, extractor_name): measured(partial(score, pair))
        for name, score in SCORES.items()
    }


def require(least: int, *sets: tuple[str, int]) -> None:
    """Leave a score out if one of the sets of (name, size) is too small."""
    small = [f"{size} {name}" for name, size in sets if size < least]
    if small:
        raise LeftOut(f"needs at least {least} images, got {', '.join(small)}")


def kernel_score(pair: Pair) -> Score:
    """Return the kernel distance with its standard error."""
    real, fake = pair.pools(3)
    estimate = kernel_distance(real, fake)
    return {
        "value": estimate.value,
        "standard_error": estimate.standard_error,
        "error_is": "jackknife over the images of both sets",
        "num_images": len(fake),
        "num_reference": len(real),
        "real": real_score(
            pair, real, lambda reference, images: kernel_distance(reference, images).value
        ),
    }


def frechet_score(pair: Pair, output: str) -> Score:
    """Return the Fréchet distance of "pool" or "spatial" features, with its jackknife error."""
    fake: Tensor | None = getattr(pair.fake, output)
    if fake is None:
        raise LeftOut(f"extractor {pair.extractor_name} has no {output} features")
    known = None if pair.statistics is None else getattr(pair.statistics, output)
    real: Tensor | None = None if pair.real is None else getattr(pair.real, output)
    if known is None and real is None:
        raise LeftOut(
            f"needs images of the reference, which has no statistics of {output} features"
        )
    count = len(real) if known is None and real is not None else None
    require(2, ("under test", len(fake)), ("of the reference", 2 if count is None else count))

    def distance(reference: Tensor, images: Tensor) -> float:
        return frechet_distance(gaussian(reference), gaussian(images))

    if known is None:
        assert real is not None
        known = gaussian(real)
    return {
        **with_jackknife(known, fake, pair.seed),
        "num_images": len(fake),
        "num_reference": count,
        "real": real_score(pair, real, distance),
    }


def with_jackknife(known: tuple[Tensor, Tensor], fake: Tensor, seed: int) -> Score:
    """Return the Fréchet distance, and its error if there are enough images."""
    if len(fake) < 2 * NUM_GROUPS:
        value = frechet_distance(known, gaussian(fake))
        return {"value": value, "standard_error": None, "error_is": None}
    estimate = jackknife_frechet(known, fake, num_groups=NUM_GROUPS, seed=seed)
    return {
        "value": estimate.value,
        "standard_error": estimate.standard_error,
        "error_is": f"jackknife over {NUM_GROUPS} groups of the images under test",
    }


def class_score(pair: Pair) -> Score:
    """Return the inception score with its deviation over splits."""
    logits = pair.fake.logits
    if logits is None:
        raise LeftOut(f"extractor {pair.extractor_name} has no classes")
    require(NUM_SPLITS, ("under test", len(logits)))
    found = inception_score(logits, num_splits=NUM_SPLITS, seed=pair.seed)
    real = None if pair.real is None else pair.real.logits

    def score(_: Tensor, images: Tensor) -> float:
        return inception_score(images, num_splits=NUM_SPLITS, seed=pair.seed).mean

    return {
        "value": found.mean,
        "standard_error": None,
        "error_is": None,
        "deviation_of_splits": found.std,
        "num_splits": NUM_SPLITS,
        "num_images": len(logits),
        "num_reference": None,
        "real": real_score(pair, real, score, num_reference=1),
    }


def neighbour_score(pair: Pair, place: int) -> Score:
    """Return precision (place 0) or recall (place 1), at equal numbers of images."""
    size, values = pair.precision_recall
    assert pair.real is not None

    def value(reference: Tensor, images: Tensor) -> float:
        return precision_recall(reference, images, k=NEIGHBOURS)[place]

    return {
        "value": values[place],
        "standard_error": None,
        "error_is": None,
        "k": NEIGHBOURS,
        "num_images": size,
        "num_reference": size,
        "real": real_score(pair, pair.real.pool, value, num_reference=size),
    }


SCORES: Mapping[str, Callable[[Pair], Score]] = {
    "KID": kernel_score,
    "FID": partial(frechet_score, output="pool"),
    "sFID": partial(frechet_score, output="spatial"),
    "IS": class_score,
    "precision": partial(neighbour_score, place=0),
    "recall": partial(neighbour_score, place=1),
}


def real_score(
    pair: Pair,
    real: Tensor | None,
    measure: Callable[[Tensor, Tensor], float],
    num_reference: int | None = None,
) -> Score:
    """Return the score of real images, as many as are under test, against other real images.

    Args:
        pair: Two sets under comparison.
        real: (R, F) features of real images.
        measure: Called with those of the reference and those in place of the images under test.
        num_reference: Number of images of the reference; by default all others, at least as many
            as are under test.
    """
    return measured(lambda: floor_score(pair, real, measure, num_reference))


def floor_score(
    pair: Pair,
    real: Tensor | None,
    measure: Callable[[Tensor, Tensor], float],
    num_reference: int | None,
) -> Score:
    """Return the floor of a score, see `real_score`."""
    count = len(pair.fake.pool)
    if not pair.with_floor:
        raise LeftOut("not asked for")
    least = count + (num_reference or count)
    if real is None or len(real) < least:
        found = 0 if real is None else len(real)
        raise LeftOut(f"needs at least {least} images of the reference, got {found}")
    others = num_reference or len(real) - count
    spread = real_floor(
        real, count, measure, num_reference=others, num_repeats=NUM_FLOORS, seed=pair.seed
    )
    return {
        "value": spread.mean,
        "deviation": spread.std,
        "num_divisions": NUM_FLOORS,
        "num_images": count,
        "num_reference": others,
    }
