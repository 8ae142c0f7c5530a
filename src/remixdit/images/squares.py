"""A source's images as square uint8 pixels, decoded ahead of their use in threads.

Threads, not processes: Pillow and numpy let go of the interpreter lock while they decode and
resize (docs/data.md has the figures), and nothing needs to be copied between processes.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from remixdit.images import decoding
from remixdit.images.source import Source, UnreadableImageError
from remixdit.seeds import hashed

__all__ = ["PictureBatch", "Pictures", "Skipped"]

CROP_STREAM = 3  # keeps the draws of the crop apart from others of the same (seed, image)


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read."""

    index: int
    image: str
    reason: str


class PictureBatch(NamedTuple):
    """Consecutive images of a source, less those that could not be read."""

    pixels: np.ndarray
    """(B, C, S, S) uint8."""
    class_labels: np.ndarray
    """(B,) int64, -1 for an image without a label."""
    skipped: list[Skipped]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How the images of a source become pixels."""

    source: Source
    image_size: int
    channels: int
    refuse_colour: bool
    """Whether a coloured image is an error: grey was guessed from a few images, not requested."""
    random_crop: bool
    seed: int
    strict: bool

    def batches(self, ranges: list[range], num_threads: int) -> Iterator[PictureBatch]:
        """Yield the images of each range, in order, decoded ahead."""
        pending: deque[Future[PictureBatch]] = deque()
        waiting = deque(ranges)
        with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
            try:
                while waiting or pending:
                    while waiting and len(pending) <= num_threads:
                        pending.append(pool.submit(self.batch, waiting.popleft()))
                    yield pending.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def batch(self, indices: range) -> PictureBatch:
        """Return the images of a range."""
        pixels: list[np.ndarray] = []
        labels: list[int] = []
        skipped: list[Skipped] = []
        for index in indices:
            try:
                pixels.append(self.pixels(index))
                labels.append(int(self.source.class_labels[index]))
            except UnreadableImageError as error:
                if self.strict:
                    raise
                skipped.append(Skipped(index, error.image, error.reason))
        shape = (0, self.channels, self.image_size, self.image_size)
        stacked = np.stack(pixels) if pixels else np.empty(shape, np.uint8)
        return PictureBatch(stacked, np.array(labels, np.int64), skipped)

    def pixels(self, index: int) -> np.ndarray:
        """Return image `index` as (C, S, S) uint8."""
        image, _ = self.source.load(index)
        name = self.source.image_names[index]
        if self.refuse_colour and image.mode != "L":
            raise ValueError(f"{name} is in colour and others are grey: set channels to 3 or 1")
        try:
            if self.random_crop:
                draws = np.random.default_rng(hashed(self.seed, CROP_STREAM, index))
                image = decoding.random_crop(image, self.image_size, draws)
            else:
                image = decoding.center_crop(image, self.image_size)
        except ValueError as error:
            raise UnreadableImageError(name, str(error)) from error
        return decoding.square_pixels(image, self.channels)
