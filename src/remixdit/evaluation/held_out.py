"""Held-out images as a model sees them: latents, and labels as the model numbers them.

Shapes: n images, C H W latents.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from remixdit.data import ShardDataset, is_shard_dir
from remixdit.evaluation.checks import are_numbers
from remixdit.evaluation.image_sets import open_images
from remixdit.images.source import UNLABELLED
from remixdit.model.config import RemixConfig
from remixdit.seeds import generator_for

__all__ = ["HeldOut", "held_out", "model_labels", "open_held_out"]

NUM_IMAGES = 1000


class HeldOut(NamedTuple):
    """Held-out images to measure a model on."""

    latents: Tensor
    """Latents, (n, C, H, W) float32."""
    class_labels: Tensor
    """Labels as the model numbers them, (n,) int64."""


def held_out(dataset: ShardDataset, num_images: int, seed: int = 0) -> HeldOut:
    """Return the first images of a data set, each posterior drawn once from (seed, image)."""
    if not 1 <= num_images <= len(dataset):
        raise ValueError(f"num_images must be in 1..{len(dataset)}, got {num_images}")
    return read_rows(dataset, np.arange(num_images), seed)


def read_rows(dataset: ShardDataset, rows: np.ndarray, seed: int) -> HeldOut:
    """Read rows (n,) of shards."""
    return HeldOut(*dataset.read(rows, np.zeros_like(rows), seed))


def open_held_out(
    path: str, config: RemixConfig, num_images: int = 0, split: str | None = None, seed: int = 0
) -> tuple[HeldOut, dict[str, Any]]:
    """Return held-out images as a model sees them, and the facts about them as JSON values.

    Args:
        path: Shards that fit the model, or, for a model of pixels, any collection of images.
        config: Configuration of the model.
        num_images: Number of images, chosen by `seed`; 0 for all, up to 1,000.
        split: Name of the split of a collection.
        seed: Seed for the choice of images, and for the posterior of latents.

    Raises:
        ValueError: The images are of other latents or classes than the model's, or too few.
    """
    if is_shard_dir(Path(path)):
        images, names, fingerprint = drawn_rows(path, config, num_images, split, seed)
    else:
        images, names, fingerprint = drawn_pixels(path, config, num_images, split, seed)
    facts = {
        "path": path,
        "split": split,
        "num_images": len(images.latents),
        "fingerprint": fingerprint,
        "labelled": bool(names) and bool(config.network.num_classes),
    }
    labels = model_labels(images.class_labels, names, config, path)
    return HeldOut(images.latents, labels), facts


# images with labels of the data, -1 for none; the names of its classes; a fingerprint
Drawn = tuple[HeldOut, tuple[str, ...], str]


def drawn_rows(
    path: str, config: RemixConfig, num_images: int, split: str | None, seed: int
) -> Drawn:
    """Draw images of shards."""
    if split is not None:
        raise ValueError(f"split must be left out for shards, got {split!r} for {path}")
    dataset, network = ShardDataset(path), config.network
    shape = (network.in_channels, network.input_size, network.input_size)
    dataset.require(config.autoencoder, shape)
    count = checked_count(num_images, len(dataset), path)
    order = torch.randperm(len(dataset), generator=generator_for(seed, "drawn images"))
    latents, labels = read_rows(dataset, np.sort(order[:count].numpy()), seed)
    labels = torch.where(labels == dataset.num_classes, UNLABELLED, labels)
    fingerprint = str(dataset.index["source"]["fingerprint"])
    return HeldOut(latents, labels), dataset.class_names, fingerprint


def drawn_pixels(
    path: str, config: RemixConfig, num_images: int, split: str | None, seed: int
) -> Drawn:
    """Draw images of a collection, as pixels in [-1, 1]."""
    if config.autoencoder["name"] != "none":
        raise ValueError(
            f"data must be shards that `remixdit encode` wrote with "
            f"{config.autoencoder['name']}, for a model of its latents, got {path}"
        )
    images = open_images(path, split, config.network.input_size, config.network.in_channels)
    drawn = images.drawn(checked_count(num_images, len(images), path), seed)
    parts = list(drawn.batches())
    rows = np.concatenate([part.rows for part in parts])
    pixels = torch.from_numpy(np.concatenate([part.images for part in parts]))
    latents = pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    labels = torch.from_numpy(drawn.class_labels[rows])
    return HeldOut(latents.contiguous(), labels), images.class_names, images.fingerprint


def checked_count(num_images: int, available: int, path: str) -> int:
    """Return how many images to draw."""
    count = num_images or min(NUM_IMAGES, available)
    if not 2 <= count <= available:
        raise ValueError(
            f"num_images must be at least 2 and at most the {available} of {path}, got {count}"
        )
    return count


def model_labels(
    class_labels: Tensor, names: Sequence[str], config: RemixConfig, path: str
) -> Tensor:
    """Return labels as a model numbers them; an image without one gets the null label.

    Classes are matched by name, and the data may hold some of the model's only. Where one of the
    two has no names for its classes, they are matched by number.

    Args:
        class_labels: (n,) int64 in [-1, len(names)), -1 for none.
        names: One for each class of the data.
        config: Configuration of the model.
        path: Path of the data, for the error.
    """
    null, ours = config.network.num_classes, config.class_names
    if not null:
        return torch.zeros_like(class_labels)
    unknown = sorted(set(names).difference(ours))
    if not unknown:
        numbers = [ours.index(name) for name in names]
    elif not ours or are_numbers(ours) or are_numbers(names):
        if len(names) != null:
            raise ValueError(
                f"data must be of the model's {null} classes, got {len(names)} in {path}"
            )
        numbers = list(range(null))
    else:
        raise ValueError(f"data must hold classes of the model, got {unknown[0]!r} in {path}")
    return torch.tensor([*numbers, null])[class_labels]  # -1 is the last, the null label
