"""Images => shards of latents on disk.

Shard s holds the images [s * shard_size, (s + 1) * shard_size) of the source, less those that
cannot be read. Rank r of R writes the shards s with s mod R = r, each beside its place and then
renamed, with a record of it in `.encoding/`. Whoever finds all records there merges them into
`index.json` and removes them. So the work can be killed anywhere and run again, and ends with the
same bytes, on any number of processes.

Shapes: B = batch_size, C channels, S = image_size, h w the size of a latent.
"""

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from remixdit.data.autoencoder import Autoencoder, LatentAutoencoder, load_autoencoder
from remixdit.data.writing import EncodedDir, ShardRecord, ShardWriter
from remixdit.distributed.ranks import pick_device
from remixdit.images.source import Source
from remixdit.images.squares import PictureBatch, Pictures
from remixdit.progress import Progress

__all__ = ["EncodeConfig", "Share", "encode"]

SHARD_BYTES = 64 * 2**20
MAX_SHARDS = 256  # each is a memory map, which holds a file descriptor
MAX_SHARD_SIZE = 4096  # images: what a kill may lose


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How images are encoded."""

    image_size: int
    """Height and width of the square pictures, in pixels."""
    autoencoder: str = "none"
    """An AutoencoderKL on the Hugging Face Hub or in a local directory; none keeps pixels."""
    channels: int | None = None
    """Number of channels: 3 or 1. By default 1 if the images are grey, else 3."""
    crop: Literal["center", "random"] = "center"
    """Crop: center, or a random square of at least 0.8 of the shorter side, by seed and image."""
    mirror: bool = False
    """Encode a mirrored copy of each image too. Pixels need none: they are mirrored when read."""
    strict: bool = False
    """Stop at the first unreadable image instead of skipping and recording it."""
    batch_size: int = 32
    """Number of images encoded at once."""
    shard_size: int | None = None
    """Number of images per shard. By default a shard takes about 64 MiB."""
    seed: int = 0
    """Seed for the random crops."""
    device: str = "auto"
    """Device of the autoencoder: auto, cpu or cuda. auto is the GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Precision of the autoencoder: fp32, bf16, or auto, which is bf16 on a GPU."""

    def __post_init__(self) -> None:
        for name, least in (("image_size", 8), ("batch_size", 1), ("shard_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if self.crop not in ("center", "random"):
            raise ValueError(f"crop must be center or random, got {self.crop!r}")
        if self.device.split(":")[0] not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu or cuda, got {self.device!r}")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision must be auto, fp32 or bf16, got {self.precision!r}")
        if self.mirror and self.autoencoder == "none":
            raise ValueError("mirror is for latents: pixels are mirrored when they are read")


class Share(NamedTuple):
    """The images that one process was to encode."""

    num_images: int
    """Number of images, including those encoded earlier."""
    images_skipped: int = 0
    """Number of images that cannot be read."""


def encode(
    source: Source,
    output_dir: str | Path,
    config: EncodeConfig,
    *,
    rank: int = 0,
    num_ranks: int = 1,
) -> Generator[Progress, None, Share]:
    """Encode this rank's share of a source; the rank that finishes last writes the index.

    Yields:
        Its progress in images, first of the shards that are there and then after every batch.

    Returns:
        What this rank's share was; all images where the index was there already.

    Raises:
        ValueError: The directory holds another encoding, an image cannot be read (when strict),
            or the autoencoder does not fit.
        OSError: The directory cannot be written.
    """
    autoencoder = load_autoencoder(config.autoencoder)
    settings = _settings(source, config, autoencoder)
    directory = EncodedDir(Path(output_dir), settings, source.earlier_fingerprint)
    with _explain_disk_errors(directory.directory):
        if not directory.start():
            yield Progress("encode", len(source), len(source))
            return Share(len(source))
        encoder = _Encoder(source, config, autoencoder, directory)
        try:
            share = yield from encoder.run(rank, num_ranks)
            directory.merge(len(encoder.shards))
        except ValueError:
            if num_ranks == 1:
                directory.discard_if_empty()
            raise
    return share


@contextmanager
def _explain_disk_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = (
            f"cannot write {error.filename or directory}: {error.strerror}; finished shards stay, "
            "and the same command continues after them"
        )
        kind = ValueError if isinstance(error, FileExistsError | NotADirectoryError) else OSError
        raise kind(text) from error


class _Encoder:
    """Turns ranges of images into shards."""

    def __init__(
        self,
        source: Source,
        config: EncodeConfig,
        autoencoder: Autoencoder,
        directory: EncodedDir,
    ) -> None:
        self.config, self.autoencoder, self.directory = config, autoencoder, directory
        settings = directory.settings
        if isinstance(autoencoder, LatentAutoencoder):
            dtype = torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
            autoencoder.to(_device(config), dtype)
        self.pictures = Pictures(
            source=source,
            image_size=config.image_size,
            channels=settings["channels"],
            refuse_colour=config.channels is None and settings["channels"] == 1,
            random_crop=config.crop == "random",
            seed=config.seed,
            strict=config.strict,
        )
        size = settings["shard_size"]
        self.shards = [
            range(first, min(first + size, len(source))) for first in range(0, len(source), size)
        ]

    def run(self, rank: int, num_ranks: int) -> Generator[Progress, None, Share]:
        """Encode those of this rank's shards that are not there yet."""
        numbers = range(rank, len(self.shards), num_ranks)
        total = sum(len(self.shards[number]) for number in numbers)
        done, skipped, missing = 0, 0, []
        for number in numbers:
            record = self.directory.record(number)
            if record is None:
                missing.append(number)
            else:
                done += len(self.shards[number])
                skipped += len(record.skipped)
        # Reported before the first batch, so that the speed excludes earlier work.
        yield _progress(done, total, skipped)
        for number in missing:
            for batch in self._write_shard(number):
                done += len(batch.pixels) + len(batch.skipped)
                skipped += len(batch.skipped)
                yield _progress(done, total, skipped)
        return Share(total, skipped)

    def _write_shard(self, number: int) -> Iterator[PictureBatch]:
        images, size = self.shards[number], self.config.batch_size
        ranges = [images[first : first + size] for first in range(0, len(images), size)]
        record = ShardRecord()
        with self.directory.writer(number) as writer:
            for batch in self.pictures.batches(ranges, num_threads=os.cpu_count() or 1):
                self._append(writer, batch)
                record.add(batch)
                yield batch
            self.directory.finish(number, writer, record)

    def _append(self, writer: ShardWriter, batch: PictureBatch) -> None:
        if len(batch.pixels):
            writer.append(self._encoded(batch.pixels))
            if self.config.mirror:
                writer.append_mirrored(self._encoded(batch.pixels[..., ::-1]))

    def _encoded(self, pixels: np.ndarray) -> np.ndarray:
        """(B, C, S, S) uint8 => stored rows: the same, or moments (B, 2 C, h, w) float16."""
        if not isinstance(self.autoencoder, LatentAutoencoder):
            return pixels
        scaled = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)
        mean, logvar = self.autoencoder.encode(scaled).chunk(2, 1)
        moments = torch.cat([mean, logvar.clamp(-30, 20)], 1)  # the bounds diffusers samples in
        if not moments.half().isfinite().all():
            raise ValueError(f"{self.config.autoencoder} gives latents past the range of float16")
        return moments.half().cpu().numpy()


def _progress(done: int, total: int, skipped: int) -> Progress:
    return Progress("encode", done, total, f"{skipped} skipped" if skipped else "")


def _settings(source: Source, config: EncodeConfig, autoencoder: Autoencoder) -> dict[str, object]:
    """Return the settings of the encoding, which are the first part of index.json."""
    channels = config.channels or source.channels
    latent_shape = autoencoder.latent_shape(config.image_size, channels)
    has_moments = isinstance(autoencoder, LatentAutoencoder)
    shape = (2 * latent_shape[0], *latent_shape[1:]) if has_moments else latent_shape
    dtype = "float16" if has_moments else "uint8"
    row_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    settings: dict[str, object] = {
        "format_version": 1,
        "kind": "moments" if has_moments else "pixels",
        "source": {
            "name": source.name,
            "num_images": len(source),
            "fingerprint": source.fingerprint,
        },
        "autoencoder": dict(autoencoder.spec),
        "image_size": config.image_size,
        "channels": channels,
        "crop": config.crop if config.crop == "center" else f"random, seed {config.seed}",
        "mirrored": config.mirror,
        "latent_shape": list(latent_shape),
        "shape": list(shape),
        "dtype": dtype,
        "shard_size": config.shard_size or _shard_size(len(source), row_bytes),
        "class_names": list(source.class_names),
    }
    if has_moments:  # these change the last bits of the moments
        settings |= {"precision": _precision(config), "batch_size": config.batch_size}
    return settings


def _precision(config: EncodeConfig) -> str:
    if config.precision != "auto":
        return config.precision
    return "fp32" if _device(config).type == "cpu" else "bf16"


def _device(config: EncodeConfig) -> torch.device:
    return pick_device("auto") if config.device == "auto" else torch.device(config.device)


def _shard_size(num_images: int, row_bytes: int) -> int:
    """Return how many images a shard holds: about 64 MiB of them, in at most 256 shards."""
    of_bytes = min(max(1, SHARD_BYTES // row_bytes), MAX_SHARD_SIZE)
    return max(of_bytes, -(-num_images // MAX_SHARDS))
