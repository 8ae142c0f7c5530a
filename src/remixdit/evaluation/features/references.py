"""References in .npz files: precomputed statistics, images, or both, as ADM published them.

mu (F,), sigma (F, F)        mean and covariance of the pooled features
mu_s, sigma_s                the same of the spatial features
arr_0 (B, H, W, C) uint8     images
arr_1 (B,)                   their class labels

`VIRTUAL_imagenet256_labeled.npz` holds them all. Statistics do not say which extractor made
them: published ones are of FID's own Inception.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from remixdit.images.npy import npz_array, npz_names, npz_stream

__all__ = ["Reference", "read_reference", "write_statistics"]

Statistics = tuple[Tensor, Tensor]

MAX_FEATURES = 2**14  # far above any extractor; a small archive may unpack to terabytes


@dataclass(frozen=True)
class Reference:
    """Contents of a reference file; images stay on disk until they are read."""

    path: Path
    pool: Statistics | None
    """Mean (F,) and covariance (F, F), float64."""
    spatial: Statistics | None
    """Mean and covariance of the spatial features, likewise."""
    image_shape: tuple[int, ...] | None
    """(B, H, W, C)."""

    def images(self, batch_size: int) -> Iterator[Tensor]:
        """Yield images (batch_size, H, W, C) uint8 in order, the last batch smaller."""
        if self.image_shape is None:
            raise ValueError(f"{self.path} must hold arr_0 for images, got statistics only")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        num_images, *shape = self.image_shape
        with npz_stream(self.path, "arr_0") as (stream, _):
            for start in range(0, num_images, batch_size):
                count = min(batch_size, num_images - start)
                yield _read_pixels(stream, (count, *shape), self.path)

    def class_labels(self) -> Tensor | None:
        """Return the class labels (B,) int64 of the images, if the file has any."""
        if "arr_1" not in npz_names(self.path):
            return None
        labels = npz_array(self.path, "arr_1")
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(
                f"arr_1 of {self.path} must be integers (B,), got {labels.dtype} {labels.shape}"
            )
        return torch.from_numpy(labels.astype(np.int64))


def read_reference(path: str | Path) -> Reference:
    """Open an .npz reference; reads statistics, and of images the shape."""
    path = Path(path)
    names = npz_names(path)
    if not {"mu", "arr_0"} & set(names):
        raise ValueError(f"{path} must hold mu and sigma, or arr_0, got {sorted(names)}")
    pool = _statistics(path, names, "mu", "sigma") if "mu" in names else None
    spatial = _statistics(path, names, "mu_s", "sigma_s") if "mu_s" in names else None
    return Reference(path, pool, spatial, _image_shape(path) if "arr_0" in names else None)


def write_statistics(path: str | Path, pool: Statistics, spatial: Statistics | None = None) -> None:
    """Write statistics that `read_reference`, and other tools, can read.

    Args:
        path: Path of the .npz file.
        pool: Mean (F,) and covariance (F, F).
        spatial: Mean and covariance of the spatial features.
    """
    arrays = {"mu": pool[0], "sigma": pool[1]}
    if spatial is not None:
        arrays |= {"mu_s": spatial[0], "sigma_s": spatial[1]}
    with Path(path).open("wb") as file:  # given a name, savez would append .npz to it
        np.savez(file, allow_pickle=False, **{name: a.cpu().numpy() for name, a in arrays.items()})


def _statistics(path: Path, names: Sequence[str], mean: str, covariance: str) -> Statistics:
    if covariance not in names:
        raise ValueError(f"{path} must hold {covariance} beside {mean}, got {names}")
    shapes = {}
    for name in (mean, covariance):
        with npz_stream(path, name) as (_, (shape, _, dtype)):
            shapes[name] = shape
        if dtype.kind != "f":
            raise ValueError(f"{name} of {path} must be numbers, got {dtype}")
    size = shapes[mean][:1]
    if shapes != {mean: size, covariance: size * 2} or not size:
        raise ValueError(
            f"{mean} and {covariance} of {path} must have the shapes (F,) and (F, F), "
            f"got {shapes[mean]} and {shapes[covariance]}"
        )
    if not 0 < size[0] <= MAX_FEATURES:
        raise ValueError(f"{mean} of {path} must be 1 to {MAX_FEATURES} numbers, got {size[0]}")
    first, second = (npz_array(path, name).astype(np.float64) for name in (mean, covariance))
    return torch.from_numpy(first), torch.from_numpy(second)


def _image_shape(path: Path) -> tuple[int, ...]:
    with npz_stream(path, "arr_0") as (_, (shape, is_fortran, dtype)):
        pass
    if len(shape) != 4 or dtype != np.uint8 or is_fortran:
        raise ValueError(
            f"arr_0 of {path} must be uint8 (B, H, W, C) in C order, got {dtype} {shape}"
        )
    return shape


def _read_pixels(stream: IO[bytes], shape: tuple[int, ...], path: Path) -> Tensor:
    wanted = int(np.prod(shape))
    data = stream.read(wanted)
    if len(data) != wanted:
        raise ValueError(f"arr_0 of {path} must have {wanted} more bytes, got {len(data)}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape)
