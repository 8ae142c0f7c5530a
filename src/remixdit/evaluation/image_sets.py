"""Images to score, wherever they lie: shards, collections, and the .npz files of ADM.

    photos/, *.parquet, *.tar, names    what `open_source` takes, cut to squares as `encode` does
    shards                              pixels as they are; latents decoded from their means
    out.npz                             arr_0 (n, S, S, C) uint8, read in passing
    VIRTUAL_imagenet256_labeled.npz     the same beside mean and covariance of features

Shapes: B images of a batch, n of a set, S = image_size, C channels (1 or 3).
"""

import logging
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from remixdit.data import ShardDataset, Source, is_shard_dir, open_source
from remixdit.data.autoencoder import Pixels, load_autoencoder
from remixdit.evaluation.features import Reference, read_reference
from remixdit.images.decoding import center_crop, square_pixels
from remixdit.images.source import (
    UNLABELLED,
    UnreadableImageError,
    fingerprint,
    numbered_class_names,
)
from remixdit.seeds import generator_for

__all__ = ["ImageBatch", "ImageSet", "open_images", "shard_images", "source_images"]

logger = logging.getLogger(__name__)

BATCH_SIZE = 64  # fixed: the last bits of a convolution depend on it, and scores on nothing else
READ_SIZE = 256  # images of an .npz in memory at once


class ImageBatch(NamedTuple):
    """Some images of a set."""

    rows: np.ndarray
    """(B,) ascending indices of the images in the set."""
    images: np.ndarray
    """(B, S, S, C) uint8."""


Read = Callable[[Sequence[np.ndarray]], Iterator[ImageBatch]]


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A numbered list of square images of one size."""

    name: str
    """Name of the set in results and messages."""
    image_size: int
    """Side of every image, S."""
    channels: int
    """Number of channels, C."""
    class_labels: np.ndarray
    """(n,) int64, -1 for an image without a label."""
    class_names: tuple[str, ...]
    """Names of the classes; empty if no image has a label."""
    fingerprint: str
    """A digest that is equal for equal images and labels."""
    read: Read = field(repr=False)
    """Yields the images of rising rows, part by part; those that cannot be read are left out."""
    batch_size: int = BATCH_SIZE
    """Number of images in a batch."""
    chosen: np.ndarray | None = None
    """(n,) ascending indices of these images in a larger set."""
    note: str = ""
    """A remark on these images that belongs beside a score."""

    def __len__(self) -> int:
        return len(self.class_labels)

    def batches(self, rank: int = 0, num_ranks: int = 1) -> Iterator[ImageBatch]:
        """Yield the images in order; with several processes, every num_ranks-th batch."""
        parts = np.split(np.arange(len(self)), range(self.batch_size, len(self), self.batch_size))
        yield from self.read(parts[rank::num_ranks])

    def drawn(self, count: int, seed: int = 0) -> "ImageSet":
        """Return `count` of the images, drawn without replacement; all of them if 0 or enough."""
        if not 0 < count < len(self):
            return self
        order = torch.randperm(len(self), generator=generator_for(seed, "drawn images"))
        chosen, read = np.sort(order[:count].numpy()), self.read

        def read_chosen(parts: Sequence[np.ndarray]) -> Iterator[ImageBatch]:
            for batch in read([chosen[part] for part in parts]):
                yield ImageBatch(np.searchsorted(chosen, batch.rows), batch.images)

        labels = self.class_labels[chosen]
        return replace(self, class_labels=labels, read=read_chosen, chosen=chosen)

    def numbers(self, rows: np.ndarray) -> np.ndarray:
        """Return which images of the whole collection some rows are."""
        return rows if self.chosen is None else self.chosen[rows]


def open_images(
    path: str | Path,
    split: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    device: torch.device | str = "cpu",
) -> ImageSet:
    """Open images for scoring.

    Args:
        path: A directory of shards, an .npz, or what `open_source` takes.
        split: Name of the split of a collection.
        image_size: Collections and .npz are scaled and cut to it; by default they must be square
            and of one size. Shards must have it.
        channels: Number of channels, likewise; by default 1 if the images are grey, else 3.
        device: Device on which the autoencoder decodes latents.
    """
    if is_shard_dir(Path(path)):
        if split is not None:
            raise ValueError(f"split must be left out for shards, got {split!r} for {path}")
        return shard_images(ShardDataset(path), image_size, channels, device)
    if Path(path).suffix == ".npz" and Path(path).is_file() and split is None:
        check_npz(Path(path))
        reference = read_npz(Path(path))
        if reference is not None:
            return npz_images(reference, image_size, channels)
    return source_images(open_source(path, split), image_size, channels)


def check_npz(path: Path) -> None:
    """Refuse a file that only has the name of an .npz, or was cut short."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} cannot be read as npz: it is no whole zip archive")


def read_npz(path: Path) -> Reference | None:
    """Return an .npz of images; None if another reader should try it, or report the error."""
    try:
        reference = read_reference(path)
    except (ValueError, OSError):
        return None
    return None if reference.image_shape is None else reference


def source_images(
    source: Source, image_size: int | None = None, channels: int | None = None
) -> ImageSet:
    """Return the images of a collection, cut to squares of `image_size`."""
    size = image_size or square_side(source)
    decoder = Decoder(source, size, channels or source.channels, must_have=image_size is None)
    return ImageSet(
        name=source.name,
        image_size=size,
        channels=decoder.channels,
        class_labels=source.class_labels,
        class_names=source.class_names,
        fingerprint=source.fingerprint,
        read=decoder.read,
    )


def square_side(source: Source) -> int:
    """Return the side of the first image, which must be square."""
    image, _ = source.load(0)
    if image.width != image.height:
        raise ValueError(
            f"image_size must be given for images that are not square, got {image.width} x "
            f"{image.height} for {source.image_names[0]} of {source.name}"
        )
    return image.width


@dataclass(frozen=True)
class Decoder:
    """Reads the images of a collection as squares."""

    source: Source
    image_size: int
    channels: int
    must_have: bool
    """Whether all images must have that size already."""

    def read(self, parts: Sequence[np.ndarray]) -> Iterator[ImageBatch]:
        """Yield the images of each part, decoded in threads; the unreadable are left out."""
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for rows in parts:
                found = list(pool.map(self.image, rows.tolist()))
                read = np.array([image is not None for image in found], bool)
                if read.any():
                    images = np.stack([image for image in found if image is not None])
                    yield ImageBatch(rows[read], images)

    def image(self, index: int) -> np.ndarray | None:
        """Return an image (S, S, C), or None if it cannot be read."""
        try:
            image, _ = self.source.load(index)
        except UnreadableImageError as error:
            logger.warning("left out %s", error)
            return None
        if self.must_have and image.size != (self.image_size, self.image_size):
            raise ValueError(
                f"image_size must be given for images of several sizes, got {image.width} x "
                f"{image.height} for {self.source.image_names[index]} and {self.image_size} for "
                f"the first of {self.source.name}"
            )
        return squared(image, self.image_size, self.channels)


def squared(image: Image.Image, image_size: int, channels: int) -> np.ndarray:
    """Return a picture as (S, S, C) uint8, cut as `encode` does."""
    pixels = square_pixels(center_crop(image, image_size), channels)  # (C, S, S)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def npz_images(
    reference: Reference, image_size: int | None = None, channels: int | None = None
) -> ImageSet:
    """Return the images of an .npz of (n, H, W, C) uint8: many need not fit into memory."""
    assert reference.image_shape is not None
    count, height, width, depth = reference.image_shape
    if image_size is None and height != width:
        raise ValueError(f"image_size must be given for images of {height} x {width}, got none")
    if depth not in (1, 3):
        raise ValueError(f"images of {reference.path} must have 1 or 3 channels, got {depth}")
    shape = (image_size or height, image_size or width, channels or depth)

    def read(parts: Sequence[np.ndarray]) -> Iterator[ImageBatch]:
        images = passing_rows(reference, np.concatenate([*parts, np.empty(0, np.int64)]))
        for rows in parts:
            kept = [in_shape(image, shape) for image in islice(images, len(rows))]
            yield ImageBatch(rows, np.stack(kept))

    found = reference.class_labels()
    labels = np.full(count, UNLABELLED) if found is None else found.numpy()
    if len(labels) != count:
        raise ValueError(f"arr_1 of {reference.path} must be {count} labels, got {len(labels)}")
    size = reference.path.stat().st_size
    return ImageSet(
        name=reference.path.name,
        image_size=shape[0],
        channels=shape[2],
        class_labels=labels,
        class_names=numbered_class_names(labels),
        fingerprint=fingerprint([*reference.image_shape, size, labels.tobytes()]),
        read=read,
    )


def passing_rows(reference: Reference, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the images of rising rows, read from the start of the file to the last of them."""
    wanted, start = deque(rows.astype(np.int64).tolist()), 0
    for images in reference.images(READ_SIZE):
        while wanted and wanted[0] < start + len(images):
            yield images[wanted.popleft() - start].numpy()
        start += len(images)
        if not wanted:
            return


def in_shape(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Return an image (H, W, C) in another size, or grey, if that is asked for."""
    if image.shape == shape:
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return squared(picture, shape[0], shape[2])


def shard_images(
    dataset: ShardDataset,
    image_size: int | None = None,
    channels: int | None = None,
    device: torch.device | str = "cpu",
) -> ImageSet:
    """Return the images of a directory of shards; latents are decoded."""
    for name, wanted in (("image_size", image_size), ("channels", channels)):
        if wanted not in (None, dataset.index[name]):
            raise ValueError(
                f"{name} of {dataset.directory} must be {wanted}, that of the images under test, "
                f"got {dataset.index[name]}"
            )
    autoencoder = load_autoencoder(dataset.autoencoder, device)

    def read(parts: Sequence[np.ndarray]) -> Iterator[ImageBatch]:
        for rows in parts:
            stored = dataset.rows(rows)
            if isinstance(autoencoder, Pixels):
                yield ImageBatch(rows, np.ascontiguousarray(stored.transpose(0, 2, 3, 1)))
            else:
                latents = dataset.means(torch.from_numpy(stored)).to(device)
                yield ImageBatch(rows, autoencoder.decode(latents).cpu().numpy())

    labels = np.array(dataset.class_labels)
    decoded = "decoded from latents: what the autoencoder loses is not counted"
    return ImageSet(
        name=str(dataset.index["source"]["name"]),
        image_size=dataset.index["image_size"],
        channels=dataset.index["channels"],
        class_labels=np.where(labels == dataset.num_classes, UNLABELLED, labels),
        class_names=dataset.class_names,
        fingerprint=dataset.index["source"]["fingerprint"],
        read=read,
        note="" if isinstance(autoencoder, Pixels) else decoded,
    )
