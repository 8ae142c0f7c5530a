"""Shards of latents on disk, and reading any rows of them.

A directory holds `index.json`, `class_labels.npy` and shards `latents-00000.npy`, ... of

* pixels: (n, C, S, S) uint8, or
* moments: (n, 2 C, h, w) float16, the mean and the log-variance of the autoencoder's posterior.
  `mirrored-00000.npy`, if asked for, holds those of the mirrored images.

`ShardDataset.read` turns rows into what a network sees. All that is random in it, the noise of the
posterior and which images are mirrored, comes from (seed, epoch, index) alone.

Shapes: B rows, C channels of a latent, H W its size.
"""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remixdit.data.autoencoder import scale_and_shift
from remixdit.data.index import INDEX_FILE, parse_index, read_index, shard_file
from remixdit.data.rowfile import RowFile
from remixdit.seeds import hashed

__all__ = ["INDEX_FILE", "LABELS_FILE", "ShardDataset", "is_shard_dir", "shard_file"]

LABELS_FILE = "class_labels.npy"
MIRROR_STREAM, NOISE_STREAM = 1, 2  # keep the draws of one image apart

Place = tuple[RowFile, int]  # a shard and a row in it


class ShardDataset:
    """A directory of shards, open for reading."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        content = read_index(self.directory)
        self.digest = hashlib.sha256(content).hexdigest()
        self.index: dict[str, Any] = parse_index(self.directory, content)
        self.autoencoder: dict[str, Any] = self.index["autoencoder"]
        self.class_names: tuple[str, ...] = tuple(self.index["class_names"])
        self.shape: tuple[int, int, int] = tuple(self.index["latent_shape"])
        self.first_rows = np.cumsum([0, *(shard["num_images"] for shard in self.index["shards"])])
        self._scale, self._shift = scale_and_shift(self.autoencoder)

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if no image has a label."""
        return len(self.class_names)

    @cached_property
    def class_labels(self) -> np.ndarray:
        """(n,) int64 in [0, num_classes]; num_classes is the null label of unlabelled images."""
        # In memory: a mapped file that is cut short under a run ends it without a word (SIGBUS).
        labels = RowFile(self.directory / LABELS_FILE, (len(self),), "int64").rows()
        for label in (labels.min(), labels.max()):
            if not 0 <= label <= self.num_classes:
                raise ValueError(
                    f"labels of {self.directory} must lie in [0, {self.num_classes}], got {label}"
                )
        return labels

    def read(
        self, indices: np.ndarray, epochs: np.ndarray, seed: int, *, mirror: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Read images as a network sees them.

        Args:
            indices: (B,) integers in [0, len(self)).
            epochs: (B,) how often each has been seen before; draws other noise.
            seed: Seed for the noise and the mirroring.
            mirror: Mirror a random half of the images, left to right.

        Returns:
            latents (B, C, H, W) float32: pixels in [-1, 1], or scaled latents drawn from the
            posterior; class_labels (B,) int64.
        """
        indices = np.asarray(indices, np.int64)
        self.check_mirror(mirror)
        coins = hashed(seed, MIRROR_STREAM, epochs, indices) & 1
        mirrored = coins.astype(bool) & mirror
        labels = torch.from_numpy(np.array(self.class_labels[indices]))
        if self.index["kind"] == "pixels":
            return self._read_pixels(indices, mirrored), labels
        seeds = hashed(seed, NOISE_STREAM, epochs, indices)
        return self._read_latents(indices, mirrored, seeds), labels

    def rows(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> np.ndarray:
        """Return rows as they are stored: (B, C, S, S) uint8 or (B, 2 C, h, w) float16.

        Args:
            indices: (B,) integers in [0, len(self)).
            mirrored: (B,) booleans: take the copy of the mirrored image.
        """
        if mirrored is None:
            mirrored = np.zeros(len(indices), bool)
        places = self._announced(indices, mirrored)
        rows = np.empty((len(indices), *self.index["shape"]), self.index["dtype"])
        buffer = rows.data.cast("B")
        row_bytes = rows[:1].nbytes
        for i, (shard, row) in enumerate(places):
            shard.read_into(row, buffer[i * row_bytes : (i + 1) * row_bytes])
        return rows

    def _announced(self, indices: np.ndarray, mirrored: np.ndarray) -> list[Place]:
        """Return where each row lies, having told the kernel that it is wanted."""
        shards = np.searchsorted(self.first_rows, indices, side="right") - 1
        rows = (indices - self.first_rows[shards]).tolist()
        places = [
            (self._shards[side][shard], row)
            for side, shard, row in zip(mirrored.tolist(), shards.tolist(), rows, strict=True)
        ]
        for shard, row in places:
            shard.expect(row)
        return places

    def _read_pixels(self, indices: np.ndarray, mirrored: np.ndarray) -> Tensor:
        pixels = self.rows(indices)  # (B, C, S, S) uint8
        pixels[mirrored] = pixels[mirrored, ..., ::-1]
        return torch.from_numpy(pixels).float().div_(127.5).sub_(1)

    def _read_latents(self, indices: np.ndarray, mirrored: np.ndarray, seeds: np.ndarray) -> Tensor:
        moments = torch.from_numpy(self.rows(indices, mirrored))  # (B, 2 C, h, w)
        # numpy asks the kernel for large pages, torch does not: 5 % faster
        latents = torch.from_numpy(np.empty((len(indices), *self.shape), np.float32))
        generator = torch.Generator()
        # An image's noise must not depend on the rest of the batch, so each has its own stream.
        for seed, noise in zip(seeds.tolist(), latents.unbind(), strict=True):
            noise.normal_(generator=generator.manual_seed(seed))
        # A few images at a time stay in the cache, and too small for torch to call more threads.
        for stored, noise in zip(torch.split(moments, 8), torch.split(latents, 8), strict=True):
            mean, logvar = (half.float() for half in stored.chunk(2, 1))  # (8, C, h, w) each
            torch.addcmul(mean, noise, logvar.mul_(0.5).exp_(), out=noise)
            noise.sub_(self._shift).mul_(self._scale)
        return latents

    def means(self, moments: Tensor) -> Tensor:
        """Return stored moments (B, 2 C, h, w) as scaled latents without noise (B, C, h, w)."""
        return (moments.float().chunk(2, 1)[0] - self._shift) * self._scale

    def require(self, autoencoder: Mapping[str, Any], shape: tuple[int, int, int]) -> None:
        """Refuse to go with a model that was trained on other latents.

        Args:
            autoencoder: The `spec` in the configuration of the model.
            shape: (C, H, W) of the latents that it takes.
        """
        if self.shape != tuple(shape):
            raise ValueError(
                f"latents of {self.directory} must be {tuple(shape)} for this model, "
                f"got {self.shape}"
            )
        # The same weights may lie under another name.
        fields = (set(autoencoder) | set(self.autoencoder)) - {"name"}
        for field in sorted(fields or {"name"}):
            wanted, found = autoencoder.get(field), self.autoencoder.get(field)
            if wanted != found:
                raise ValueError(
                    f"{field} of the autoencoder of {self.directory} must be {wanted} for this "
                    f"model, got {found}"
                )

    def check_files(self) -> None:
        """Refuse shards or labels that are missing or of another size or kind than indexed."""
        for number in range(len(self.index["shards"])):
            for side in self._shards[: 1 + self.index["mirrored"]]:
                side[number]  # opens it
        self.class_labels  # noqa: B018 - reads it

    def check_mirror(self, mirror: bool) -> None:
        """Refuse to mirror latents whose mirrored copy was not encoded."""
        if mirror and self.index["kind"] == "moments" and not self.index["mirrored"]:
            raise ValueError(
                f"mirror needs latents of mirrored images, and {self.directory} was encoded "
                "without: a mirrored latent is not the latent of a mirrored image"
            )

    @cached_property
    def _shards(self) -> list["_Shards"]:
        return [_Shards(self.directory, self.index, mirrored=side) for side in (False, True)]


class _Shards(dict[int, RowFile]):
    """Shards by number, each opened when it is first read."""

    def __init__(self, directory: Path, index: Mapping[str, Any], *, mirrored: bool) -> None:
        super().__init__()
        self.directory, self.index, self.mirrored = directory, index, mirrored

    def __missing__(self, number: int) -> RowFile:
        path = self.directory / shard_file(number, mirrored=self.mirrored)
        shape = (self.index["shards"][number]["num_images"], *self.index["shape"])
        self[number] = RowFile(path, shape, self.index["dtype"])
        return self[number]


def is_shard_dir(path: Path) -> bool:
    """Return whether a path is a finished directory of shards."""
    return (path / INDEX_FILE).is_file()
