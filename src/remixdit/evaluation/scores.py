"""Features of two sets of images => every score that they allow, each with its error and floor.

    real = reference_features(open_source("photos", "test"), extractor)
    fake = image_features(batches, extractor)
    scores(real, fake, extractor.name)["KID-lite0"]["value"]

A score that cannot be had says why: `{"value": None, "left_out": "..."}`. Beside each stands what
real images score against others at the same number ("real"), where there are enough of them.

Shapes: n images under test, R real ones, F features.
"""

from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from remixdit import distributed
from remixdit.data import ShardDataset, Source
from remixdit.evaluation.features import Extractor, Reference, metric_name
from remixdit.evaluation.image_sets import ImageBatch, ImageSet, shard_images, source_images
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
from remixdit.progress import Progress

__all__ = ["FeatureSet", "collect", "image_features", "reference_features", "scores"]

NEIGHBOURS = 3  # k of precision and recall, as published
NUM_GROUPS = 20  # of the jackknife
NUM_FLOORS = 3  # random divisions of the real images
NUM_SPLITS = 10  # of the inception score, as published

Score = dict[str, Any]


class FeatureSet(NamedTuple):
    """What an extractor sees in a set of images; None for what it has no output for."""

    pool: Tensor
    """(n, F) float32."""
    logits: Tensor | None = None
    """(n, classes), for the inception score."""
    spatial: Tensor | None = None
    """(n, positions * channels), for the spatial distance."""


def image_features(batches: Iterable[np.ndarray], extractor: Extractor) -> FeatureSet:
    """Return the features of batches (B, H, W, C) of uint8 images, in their order."""
    parts = [extractor(torch.from_numpy(images)) for images in batches]
    if not parts:
        raise ValueError("images must be at least 1, got none")
    return FeatureSet(
        torch.cat([part.pool for part in parts]),
        joined([part.logits for part in parts]),
        joined([part.spatial for part in parts]),
    )


def joined(parts: list[Tensor | None]) -> Tensor | None:
    """Return one tensor of the parts of an output, None where the extractor does not have it."""
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


def reference_features(
    dataset: ShardDataset | Source | ImageSet,
    extractor: Extractor,
    num_images: int = 0,
    *,
    image_size: int | None = None,
    seed: int = 0,
) -> FeatureSet:
    """Return the features of real images.

    Args:
        dataset: Shards, of which latents are decoded, or a collection.
        extractor: Of features.
        num_images: How many are drawn by `seed`; 0 for all.
        image_size: Images of a collection are scaled and cut to it, as `encode` does.
        seed: Of the draw.
    """
    if isinstance(dataset, ShardDataset):
        dataset = shard_images(dataset, image_size, device=extractor.device)
    elif isinstance(dataset, Source):
        dataset = source_images(dataset, image_size)
    drawn = dataset.drawn(num_images, seed)
    return image_features((batch.images for batch in drawn.batches()), extractor)


def collect(
    batches: Iterable[ImageBatch],
    num_images: int,
    extractor: Extractor,
    *,
    stage: str = "images",
    num_ranks: int = 1,
) -> Generator[Progress, None, tuple[FeatureSet, Tensor]]:
    """Extract this process's share of the images and gather the features of all processes.

    Args:
        batches: This process's; each row comes to one process.
        num_images: n of the set, over all processes.
        extractor: Sees all of them.
        stage: Name of the progress.
        num_ranks: Number of processes.

    Yields:
        The progress of this process in images.

    Returns:
        The features of all images that came, in order of their rows, and those rows (n,).
    """
    done, parts, rows = 0, [], [torch.empty(0, dtype=torch.int64)]
    share = -(-num_images // num_ranks)
    yield Progress(stage, 0, share)
    for batch in batches:
        parts.append(extractor(torch.from_numpy(batch.images)))
        rows.append(torch.from_numpy(batch.rows))
        done += len(batch.rows)
        yield Progress(stage, done, share)
    mine = torch.cat(rows).to(extractor.device)
    came = torch.zeros(num_images, device=extractor.device)
    came[mine] = 1
    distributed.all_reduce([came])
    kept = came.nonzero()[:, 0]
    one = extractor(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))  # which outputs there are
    outputs = [
        None
        if shape is None
        else gathered(shape.new_zeros(num_images, shape.shape[1]), mine, joined(list(column)))[kept]
        for shape, *column in zip(one, *parts, strict=True)
    ]
    assert outputs[0] is not None
    return FeatureSet(outputs[0], *outputs[1:]), kept


def gathered(zeros: Tensor, rows: Tensor, mine: Tensor | None) -> Tensor:
    """Return what all processes have for their rows.

    Each row is zero on all processes but one, so that the sum is a gather, to the bit.
    """
    if mine is not None:
        zeros[rows] = mine
    distributed.all_reduce([zeros])
    return zeros


class Pair(NamedTuple):
    """What is compared."""

    real: FeatureSet | None
    fake: FeatureSet
    statistics: Reference | None
    extractor_name: str
    seed: int
    with_floor: bool


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
        real: R real images; None where only their statistics are known.
        fake: n images under test.
        extractor_name: `Extractor.name` of both.
        statistics: Mean and covariance of more real images; the Fréchet distances are to them.
        seed: Of the draws: groups of the jackknife, subsets of equal size, divisions of `real`.
        with_floor: Score real images against others too; takes several times as long.
    """
    pair = Pair(real, fake, statistics, extractor_name, seed, with_floor)
    found: dict[str, Score | str] = {
        "KID": kernel_score(pair),
        "FID": frechet_score(pair, "pool"),
        "sFID": frechet_score(pair, "spatial"),
        "IS": class_score(pair),
        **neighbour_scores(pair),
    }
    return {
        metric_name(name, extractor_name): left_out(score) if isinstance(score, str) else score
        for name, score in found.items()
    }


def left_out(reason: str) -> Score:
    """Return the score that says why there is none."""
    return {"value": None, "left_out": reason}


def too_few(least: int, *sets: tuple[str, int]) -> str:
    """Return why sets of (name, size) are too small, or nothing."""
    small = [f"{size} {name}" for name, size in sets if size < least]
    return f"needs at least {least} images, got {', '.join(small)}" if small else ""


NO_IMAGES = "needs images of the reference, which holds statistics only"


def kernel_score(pair: Pair) -> Score | str:
    """Return the kernel distance with its standard error."""
    if pair.real is None:
        return NO_IMAGES
    real, fake = pair.real.pool, pair.fake.pool
    if reason := too_few(3, ("under test", len(fake)), ("of the reference", len(real))):
        return reason
    estimate = kernel_distance(real, fake)
    return {
        "value": estimate.value,
        "standard_error": estimate.standard_error,
        "error_is": "jackknife over the images of both sets",
        "num_images": len(fake),
        "num_reference": len(real),
        "real": floor_of(
            pair, real, lambda reference, images: kernel_distance(reference, images).value
        ),
    }


def frechet_score(pair: Pair, output: str) -> Score | str:
    """Return the Fréchet distance of "pool" or "spatial" features, with its jackknife error."""
    fake: Tensor | None = getattr(pair.fake, output)
    if fake is None:
        return f"extractor {pair.extractor_name} has no {output} features"
    known = None if pair.statistics is None else getattr(pair.statistics, output)
    real: Tensor | None = None if pair.real is None else getattr(pair.real, output)
    if known is None and real is None:
        return f"needs images of the reference, which has no statistics of {output} features"
    count = len(real) if known is None and real is not None else None
    if reason := too_few(2, ("under test", len(fake)), ("of the reference", count or 2)):
        return reason

    def distance(reference: Tensor, images: Tensor) -> float:
        return frechet_distance(gaussian(reference), gaussian(images))

    if known is None:
        assert real is not None
        known = gaussian(real)
    return {
        **with_jackknife(known, fake, pair.seed),
        "num_images": len(fake),
        "num_reference": count,
        "real": floor_of(pair, real, distance),
    }


def with_jackknife(known: tuple[Tensor, Tensor], fake: Tensor, seed: int) -> Score:
    """Return the Fréchet distance, and its error where there are enough images to tell."""
    if len(fake) < 2 * NUM_GROUPS:
        value = frechet_distance(known, gaussian(fake))
        return {"value": value, "standard_error": None, "error_is": None}
    estimate = jackknife_frechet(known, fake, num_groups=NUM_GROUPS, seed=seed)
    return {
        "value": estimate.value,
        "standard_error": estimate.standard_error,
        "error_is": f"jackknife over {NUM_GROUPS} groups of the images under test",
    }


def class_score(pair: Pair) -> Score | str:
    """Return the inception score with its deviation over splits."""
    logits = pair.fake.logits
    if logits is None:
        return f"extractor {pair.extractor_name} has no classes"
    if reason := too_few(NUM_SPLITS, ("under test", len(logits))):
        return reason
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
        "real": floor_of(pair, real, score, num_reference=1),
    }


def neighbour_scores(pair: Pair) -> dict[str, Score | str]:
    """Return precision and recall, at equal numbers of images: the larger set is thinned."""
    names = ("precision", "recall")
    if pair.real is None:
        return dict.fromkeys(names, NO_IMAGES)
    real, fake = pair.real.pool, pair.fake.pool
    least = NEIGHBOURS + 1
    if reason := too_few(least, ("under test", len(fake)), ("of the reference", len(real))):
        return dict.fromkeys(names, reason)
    size = min(len(real), len(fake))
    generator = torch.Generator().manual_seed(pair.seed)
    thinned = draw(real, size, generator), draw(fake, size, generator)
    values = precision_recall(*thinned, k=NEIGHBOURS)
    found: dict[str, Score | str] = {}
    for place, name in enumerate(names):

        def value(reference: Tensor, images: Tensor, place: int = place) -> float:
            return precision_recall(reference, images, k=NEIGHBOURS)[place]

        found[name] = {
            "value": values[place],
            "standard_error": None,
            "error_is": None,
            "k": NEIGHBOURS,
            "num_images": size,
            "num_reference": size,
            "real": floor_of(pair, real, value, num_reference=size),
        }
    return found


def floor_of(
    pair: Pair,
    real: Tensor | None,
    measure: Callable[[Tensor, Tensor], float],
    num_reference: int | None = None,
) -> Score:
    """Return what as many real images as are under test score against others.

    Args:
        pair: Under comparison.
        real: (R, F) features of real images.
        measure: Called with those of the reference and those in place of the images under test.
        num_reference: Of the reference; by default all others, at least as many as under test.
    """
    count = len(pair.fake.pool)
    if not pair.with_floor:
        return left_out("not asked for")
    least = count + (num_reference or count)
    if real is None or len(real) < least:
        found = 0 if real is None else len(real)
        return left_out(f"needs at least {least} images of the reference, got {found}")
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
