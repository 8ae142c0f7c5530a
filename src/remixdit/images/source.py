"""What every kind of image collection becomes: a numbered list of pictures, some with labels.

A `Source` knows names and labels of all its images and reads one at a time. The readers differ
(`folders`, `tables`, `archives`); decoding and what may go wrong with it are the same for all.
"""

import hashlib
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from remixdit.images import decoding

__all__ = [
    "MAX_FILE_BYTES",
    "UNLABELLED",
    "Source",
    "UnreadableImageError",
    "collection_name",
    "fingerprint",
    "numbered_class_names",
    "regular_file_bytes",
]

UNLABELLED = -1
NUM_SAMPLED_FOR_COLOUR = 64
MAX_FILE_BYTES = 2**29  # of one image: more than the largest picture takes uncompressed
MIN_CLASS_LIMIT, CLASSES_PER_IMAGE = 1000, 10  # past both, numbers are no labels but codes


class UnreadableImageError(ValueError):
    """An image that cannot be read, and why."""

    def __init__(self, image: str, reason: str) -> None:
        super().__init__(f"{image}: {reason}")
        self.image, self.reason = image, reason


@dataclass(frozen=True, kw_only=True)
class Source:
    """A numbered list of pictures."""

    name: str
    """Name of the collection in index.json and in messages."""
    image_names: Sequence[str] = field(repr=False)
    """(n,) names of the images: the path inside the collection, or the row."""
    class_labels: np.ndarray = field(repr=False)
    """(n,) int64 in [0, num_classes), or -1 for an image without a label."""
    class_names: tuple[str, ...] = ()
    """Names of the classes; empty if no image has a label."""
    fingerprint: str
    """A digest that changes if images are added, removed, renamed, relabelled or resized."""
    earlier_fingerprint: str = ""
    """The one of encodings in which labels of Parquet did not count yet."""
    read: Callable[[int], bytes | np.ndarray] = field(repr=False)
    """Image i as the bytes of its file, or as (H, W) or (H, W, 3) uint8.."""

    def __post_init__(self) -> None:
        if len(self.image_names) == 0:
            raise ValueError(f"{self.name} holds no images")
        labels = self.class_labels
        if labels.max() >= self.num_classes or labels.min() < UNLABELLED:
            worst = labels.max() if labels.max() >= self.num_classes else labels.min()
            raise ValueError(
                f"labels of {self.name} must lie in [0, {self.num_classes}), got {worst}"
            )

    def __len__(self) -> int:
        return len(self.image_names)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if no image has a label."""
        return len(self.class_names)

    @cached_property
    def channels(self) -> int:
        """1 when every one of 64 images spread over the collection is grey, else 3."""
        sampled = np.linspace(0, len(self) - 1, min(len(self), NUM_SAMPLED_FOR_COLOUR))
        return 1 if all(self._is_grey(int(i)) for i in sampled) else 3

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Return image `index`, upright, in mode "L" or "RGB", and its label (-1: it has none).

        Raises:
            UnreadableImageError: a ValueError that names the image and says why.
        """
        try:
            stored = self.read(index)
            image = (
                decoding.decode(stored) if isinstance(stored, bytes) else Image.fromarray(stored)
            )
        except OSError as error:
            reason = error.strerror or str(error)
            raise UnreadableImageError(self.image_names[index], reason) from error
        except Exception as error:  # of any reader: pyarrow's, those of `datasets`, ...
            reason = str(error) or type(error).__name__
            raise UnreadableImageError(self.image_names[index], reason) from error
        return image, int(self.class_labels[index])

    def subset(self, indices: np.ndarray, name: str) -> "Source":
        """Return the images `indices` (m,) alone, as a source called `name`."""
        read = self.read
        return replace(
            self,
            name=name,
            image_names=[self.image_names[i] for i in indices],
            class_labels=self.class_labels[indices],
            fingerprint=fingerprint([self.fingerprint, *indices.tolist()]),
            read=lambda i: read(int(indices[i])),
        )

    def _is_grey(self, index: int) -> bool:
        try:
            stored = self.read(index)
        except Exception:
            return True  # unreadable: load() says so, this only asks for a colour
        return decoding.is_grey(stored) if isinstance(stored, bytes) else stored.ndim == 2


def fingerprint(parts: Iterable[object]) -> str:
    """Return a sha256 over the given names, sizes and labels."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else f"{part}\n".encode())
    return digest.hexdigest()


def collection_name(path: Path) -> str:
    """Return what a collection is called, however its folder is spelled: `.` has a name too."""
    return path.resolve().name if path.is_dir() else path.name


def regular_file_bytes(path: Path) -> bytes:
    """Return the content of a file that is one: a pipe or a device would never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"a file must hold at most {MAX_FILE_BYTES} bytes, got {status.st_size}")
    return path.read_bytes()


def numbered_class_names(class_labels: np.ndarray) -> tuple[str, ...]:
    """Return "0", "1", ... for labels that come without names.

    Raises:
        ValueError: They are far beyond the number of images: hashes, file numbers, or a mistake.
    """
    largest = int(class_labels.max(initial=-1))
    limit = max(MIN_CLASS_LIMIT, CLASSES_PER_IMAGE * len(class_labels))
    if largest >= limit:
        raise ValueError(
            f"labels without class names must be below {limit} for {len(class_labels)} images, "
            f"got {largest}: number the classes 0, 1, 2, ..."
        )
    return tuple(str(label) for label in range(largest + 1))
