"""References in .npz files: precomputed statistics, images, or both, as ADM published them.

mu (F,), sigma (F, F)        mean and covariance of the pooled features
mu_s, sigma_s                the same of the spatial features
arr_0 (B, H, W, C) uint8     images
arr_1 (B,)                   their class labels

`VIRTUAL_imagenet256_labeled.npz` holds them all. Statistics do not say which extractor made
them: published ones are of FID's own Inception.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

__all__ = ["Reference", "read_reference", "write_statistics"]

Statistics = tuple[Tensor, Tensor]


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
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
            _read_header(stream, self.path)
            for start in range(0, num_images, batch_size):
                count = min(batch_size, num_images - start)
                yield _read_pixels(stream, (count, *shape), self.path)

    def class_labels(self) -> Tensor | None:
        """Return the class labels (B,) int64 of the images, if the file has any."""
        with np.load(self.path, allow_pickle=False) as arrays:
            if "arr_1" not in arrays.files:
                return None
            labels = arrays["arr_1"]
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(
                f"arr_1 of {self.path} must be integers (B,), got {labels.dtype} {labels.shape}"
            )
        return torch.from_numpy(labels.astype(np.int64))


def read_reference(path: str | Path) -> Reference:
    """Open an .npz reference; reads statistics, and of images the shape."""
    path = Path(path)
    with np.load(path, allow_pickle=False) as arrays:
        names = set(arrays.files)
        if not names & {"mu", "arr_0"}:
            raise ValueError(f"{path} must hold mu and sigma, or arr_0, got {sorted(names)}")
        pool = _statistics(arrays, "mu", "sigma", path) if "mu" in names else None
        spatial = _statistics(arrays, "mu_s", "sigma_s", path) if "mu_s" in names else None
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


def _statistics(arrays: np.lib.npyio.NpzFile, mean: str, covariance: str, path: Path) -> Statistics:
    if covariance not in arrays.files:
        raise ValueError(f"{path} must hold {covariance} beside {mean}, got {arrays.files}")
    first, second = arrays[mean], arrays[covariance]
    if first.ndim != 1 or second.shape != 2 * first.shape:
        raise ValueError(
            f"{mean} and {covariance} of {path} must have the shapes (F,) and (F, F), "
            f"got {first.shape} and {second.shape}"
        )
    return torch.from_numpy(first).double(), torch.from_numpy(second).double()


def _image_shape(path: Path) -> tuple[int, ...]:
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        return _read_header(stream, path)


def _read_header(stream: IO[bytes], path: Path) -> tuple[int, ...]:
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, fortran_order, dtype = read(stream)
    if len(shape) != 4 or dtype != np.uint8 or fortran_order:
        raise ValueError(
            f"arr_0 of {path} must be uint8 (B, H, W, C) in C order, got {dtype} {shape}"
        )
    return tuple(shape)


def _read_pixels(stream: IO[bytes], shape: tuple[int, ...], path: Path) -> Tensor:
    wanted = int(np.prod(shape))
    data = stream.read(wanted)
    if len(data) != wanted:
        raise ValueError(f"arr_0 of {path} must have {wanted} more bytes, got {len(data)}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape)
