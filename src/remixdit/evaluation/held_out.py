"""Held-out images as a model sees them: latents, and labels as the model numbers them.

Shapes: n images, C H W latents.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from remixdit.data import ShardDataset, is_shard_dir
from remixdit.data.autoencoder import Pixels
from remixdit.evaluation.image_sets import open_images
from remixdit.images.source import UNLABELLED
from remixdit.model.config import RemixConfig
from remixdit.model.match import Side, match, side_of
from remixdit.seeds import generator_for

__all__ = ["HeldOut", "held_out", "model_labels", "open_held_out", "side_of_shards"]

NUM_IMAGES = 1000


class HeldOut(NamedTuple):
    """Held-out images to measure a model on."""

    latents: Tensor
    """Latents, (n, C, H, W) float32."""
    class_labels: Tensor
    """Labels as the model numbers them, (n,) int64."""


def held_out(dataset: ShardDataset, num_images: int, config: RemixConfig, seed: int = 0) -> HeldOut:
    """Return the first images of a data set as a model sees them.

    Args:
        dataset: Shards that fit the model.
        num_images: Number of images.
        config: Configuration of the model.
        seed: Seed for the posteriors, each of which is drawn once from (seed, image).
    """
    if not 1 <= num_images <= len(dataset):
        raise ValueError(f"num_images must be in 1..{len(dataset)}, got {num_images}")
    found = read_rows(dataset, np.arange(num_images), seed)
    return HeldOut(found.latents, model_labels(found.class_labels, side_of_shards(dataset), config))


def side_of_shards(dataset: ShardDataset) -> Side:
    """Return what shards state."""
    return Side(
        name=str(dataset.directory),
        num_classes=dataset.num_classes,
        class_names=dataset.class_names,
        autoencoder=dataset.autoencoder,
        latent_shape=dataset.shape,
    )


def read_rows(dataset: ShardDataset, rows: np.ndarray, seed: int) -> HeldOut:
    """Read rows (n,) of shards, with labels of the data, -1 for none."""
    latents, labels = dataset.read(rows, np.zeros_like(rows), seed)
    return HeldOut(latents, torch.where(labels == dataset.num_classes, UNLABELLED, labels))


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
        images, side, fingerprint = drawn_rows(path, config, num_images, split, seed)
    else:
        images, side, fingerprint = drawn_pixels(path, config, num_images, split, seed)
    facts = {
        "path": path,
        "split": split,
        "num_images": len(images.latents),
        "fingerprint": fingerprint,
        "labelled": bool(side.num_classes) and bool(config.network.num_classes),
    }
    labels = model_labels(images.class_labels, side, config)
    return HeldOut(images.latents, labels), facts


# images with labels of the data, -1 for none; what the data state; a fingerprint
Drawn = tuple[HeldOut, Side, str]


def drawn_rows(
    path: str, config: RemixConfig, num_images: int, split: str | None, seed: int
) -> Drawn:
    """Draw images of shards."""
    if split is not None:
        raise ValueError(f"split must be left out for shards, got {split!r} for {path}")
    dataset = ShardDataset(path)
    side = side_of_shards(dataset)
    match(side_of("the model", config), side, subset=True)  # before anything is read
    count = checked_count(num_images, len(dataset), path)
    order = torch.randperm(len(dataset), generator=generator_for(seed, "drawn images"))
    drawn = read_rows(dataset, np.sort(order[:count].numpy()), seed)
    return drawn, side, str(dataset.index["source"]["fingerprint"])


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
    side = Side(
        name=path,
        num_classes=len(images.class_names),
        class_names=images.class_names,
        autoencoder=Pixels.spec,
    )
    return HeldOut(latents.contiguous(), labels), side, images.fingerprint


def checked_count(num_images: int, available: int, path: str) -> int:
    """Return how many images to draw."""
    count = num_images or min(NUM_IMAGES, available)
    if not 2 <= count <= available:
        raise ValueError(
            f"num_images must be at least 2 and at most the {available} of {path}, got {count}"
        )
    return count


def model_labels(class_labels: Tensor, side: Side, config: RemixConfig) -> Tensor:
    """Return labels as a model numbers them; an image without one gets the null label.

    Classes are matched by name, and the data may hold some of the model's only. Where one of the
    two has no names for its classes, they are matched by number.

    Args:
        class_labels: (n,) int64 in [-1, num_classes) of the data, -1 for none.
        side: What the data state.
        config: Configuration of the model.
    """
    numbers, null = (
        match(side_of("the model", config), side, subset=True),
        config.network.num_classes,
    )
    if not null:
        return torch.zeros_like(class_labels)
    return torch.tensor([*numbers, null])[class_labels]  # -1 is the last, the null label
