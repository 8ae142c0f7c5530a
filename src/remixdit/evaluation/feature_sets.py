"""Images => what an extractor sees in them, over all processes.

    real = reference_features(open_source("photos", "test"), extractor)
    fake = image_features(batches, extractor)

Shapes: n images, B of a batch, F features.
"""

from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from remixdit import distributed
from remixdit.data import ShardDataset, Source
from remixdit.evaluation.features import Extractor, Features
from remixdit.evaluation.image_sets import ImageBatch, ImageSet, shard_images, source_images
from remixdit.progress import Progress

__all__ = ["FeatureSet", "collect", "image_features", "reference_features"]


class FeatureSet(NamedTuple):
    """Features of a set of images; None for an output that the extractor does not have."""

    pool: Tensor
    """Pooled features, (n, F) float32."""
    logits: Tensor | None = None
    """Logits of the classes, (n, classes), for the inception score."""
    spatial: Tensor | None = None
    """Features of all positions, (n, positions * channels), for the spatial distance."""


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
        extractor: Sees the images.
        num_images: Number of images, drawn by `seed`; 0 for all.
        image_size: Images of a collection are scaled and cut to it, as `encode` does.
        seed: Seed for the choice of images.
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
    done, share = 0, -(-num_images // num_ranks)
    parts, rows = [], [torch.empty(0, dtype=torch.int64)]
    yield Progress(stage, 0, share)
    for batch in batches:
        parts.append(extractor(torch.from_numpy(batch.images)))
        rows.append(torch.from_numpy(batch.rows))
        done += len(batch.rows)
        yield Progress(stage, done, share)
    return gathered(parts, torch.cat(rows), num_images, extractor)


def gathered(
    parts: Sequence[Features],
    rows: Tensor,  # (m,) of this process's images
    num_images: int,
    extractor: Extractor,
) -> tuple[FeatureSet, Tensor]:
    """Return the features of all processes, and which rows (n,) of the set they are of."""
    mine = rows.to(extractor.device)
    came = torch.zeros(num_images, device=extractor.device)
    came[mine] = 1
    distributed.all_reduce([came])
    kept = came.nonzero()[:, 0]
    one = extractor(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))  # which outputs there are
    outputs = [
        None
        if shape is None
        else summed(shape.new_zeros(num_images, shape.shape[1]), mine, joined(list(column)))[kept]
        for shape, *column in zip(one, *parts, strict=True)
    ]
    assert outputs[0] is not None
    return FeatureSet(outputs[0], *outputs[1:]), kept


def summed(zeros: Tensor, rows: Tensor, mine: Tensor | None) -> Tensor:
    """Return the rows of all processes.

    Each row is zero on all processes but one, so that the sum is a gather, to the bit.
    """
    if mine is not None:
        zeros[rows] = mine
    distributed.all_reduce([zeros])
    return zeros
