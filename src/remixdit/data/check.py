"""Verification of a directory of shards: its files, labels, statistics and pictures."""

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from remixdit.data.autoencoder import Pixels, load_autoencoder
from remixdit.data.shards import LABELS_FILE, ShardDataset
from remixdit.data.writing import PARTS_DIR
from remixdit.files import file_digest
from remixdit.progress import Progress

__all__ = ["Report", "check"]

NUM_MEASURED = 1024  # images the statistics are taken of
NUM_SHOWN = 64
STD_RANGE = (0.5, 2.0)  # a noise schedule is made for latents of standard deviation 1


@dataclass(frozen=True, kw_only=True)
class Report:
    """Findings of `check`."""

    dataset: ShardDataset
    problems: tuple[str, ...]
    """Problems, one sentence each; empty if the directory is whole."""
    remarks: tuple[str, ...] = ()
    """Observations that may be intended, one sentence each."""
    class_counts: np.ndarray
    """(num_classes + 1,) number of images of each class, and last of those without a label."""
    latent_mean: float = math.nan
    latent_std: float = math.nan
    """Standard deviation of latents as a network sees them, over up to 1,024 images."""
    contact_sheet: Image.Image | None = None
    """Up to 64 images, spread over the set, decoded; None if the autoencoder cannot be loaded."""

    def summary(self) -> list[str]:
        """Return the findings as lines for a person."""
        dataset = self.dataset
        index = dataset.index
        return [
            f"{len(dataset):,} images of {index['source']['name']}, {len(index['shards'])} shards",
            f"latents {dataset.shape}, {index['kind']} {index['dtype']}, "
            f"autoencoder {dataset.autoencoder['name']}",
            f"mean {self.latent_mean:.3f}, standard deviation {self.latent_std:.3f}",
            *self.histogram(),
            *(f"note: {remark}" for remark in self.remarks),
            *(f"problem: {problem}" for problem in self.problems),
        ]

    def histogram(self, num_lines: int = 20, width: int = 40) -> list[str]:
        """Return one line per class, or of the largest and smallest if there are many."""
        names = [*self.dataset.class_names, "(no label)"]
        order = [int(label) for label in np.argsort(-self.class_counts, kind="stable")]
        order = [label for label in order if label < len(names) - 1 or self.class_counts[-1]]
        if len(order) > num_lines:
            half = num_lines // 2
            order = [*order[:half], -1, *order[-half:]]
        most = max(1, int(self.class_counts.max()))
        return [
            "..."
            if label == -1
            else f"{names[label]:>16.16} {self.class_counts[label]:>8,} "
            + "#" * math.ceil(width * self.class_counts[label] / most)
            for label in order
        ]


def check(directory: str | Path) -> Generator[Progress, None, Report]:
    """Verify a directory of shards.

    Args:
        directory: That of a finished encoding.

    Yields:
        Its progress in files.

    Raises:
        ValueError: There is no index to verify against.
    """
    dataset = ShardDataset(directory)
    problems = yield from _wrong_files(dataset)
    try:
        dataset.check_files()
    except ValueError as error:
        problems = problems or [str(error)]
    if problems:
        # Broken shards are not decoded: their pictures would be meaningless.
        counts = np.zeros(dataset.num_classes + 1, np.int64)
        return Report(dataset=dataset, problems=tuple(problems), class_counts=counts)
    counts = np.bincount(dataset.class_labels, minlength=dataset.num_classes + 1)
    chosen = _spread(len(dataset), NUM_MEASURED)
    latents, _ = dataset.read(chosen, np.zeros_like(chosen), seed=0)
    sheet, remark = _contact_sheet(dataset)
    return Report(
        dataset=dataset,
        problems=(),
        remarks=(*_remarks(dataset, counts, float(latents.std())), *remark),
        class_counts=counts,
        latent_mean=float(latents.mean()),
        latent_std=float(latents.std()),
        contact_sheet=sheet,
    )


def _wrong_files(dataset: ShardDataset) -> Generator[Progress, None, list[str]]:
    """Return one sentence for each file that differs from the index or is not in it."""
    problems = []
    expected = {LABELS_FILE: dataset.index["class_labels_digest"]}
    for shard in dataset.index["shards"]:
        expected |= shard["digests"]
    for done, (name, digest) in enumerate(expected.items(), start=1):
        path = dataset.directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif file_digest(path) != digest:
            problems.append(f"{name} is damaged: its checksum is not that of the index")
        yield Progress("check", done, len(expected))
    for path in sorted(dataset.directory.glob("*.npy")):
        if path.name not in expected:
            problems.append(f"{path.name} belongs to another encoding: the index does not name it")
    if (dataset.directory / PARTS_DIR).exists():
        problems.append(f"{PARTS_DIR} is left of an encoding: encode again with the same command")
    return problems


def _remarks(dataset: ShardDataset, class_counts: np.ndarray, std: float) -> Iterator[str]:
    if dataset.index["kind"] == "moments" and not STD_RANGE[0] <= std <= STD_RANGE[1]:
        yield (
            f"the standard deviation of the latents should be near 1, got {std:.3f}: "
            "the autoencoder's scaling_factor does not suit these images"
        )
    skipped = dataset.index["skipped"]
    if skipped:
        first = skipped[0]
        yield (
            f"{len(skipped)} images could not be read, such as {first['image']}: {first['reason']}"
        )
    empty = [
        name
        for name, count in zip(dataset.class_names, class_counts[:-1], strict=False)
        if count == 0
    ]
    if empty and class_counts.any():
        yield f"{len(empty)} classes hold no image, such as {empty[0]}"


def _contact_sheet(dataset: ShardDataset) -> tuple[Image.Image | None, tuple[str, ...]]:
    name = dataset.autoencoder["name"]
    if not _is_here(name):  # the index may come from anywhere: it is not asked what to download
        return None, (f"no contact sheet: autoencoder {name} is not on this machine",)
    try:
        autoencoder = load_autoencoder(dataset.autoencoder)
    except ValueError as error:  # shards may be checked where their autoencoder is not
        return None, (f"no contact sheet: {error}",)
    chosen = _spread(len(dataset), NUM_SHOWN)
    rows = torch.from_numpy(dataset.rows(chosen)).float()
    latents = rows / 127.5 - 1 if isinstance(autoencoder, Pixels) else dataset.means(rows)
    images = torch.cat([autoencoder.decode(part) for part in torch.split(latents, 8)])
    return _grid(images.cpu().numpy()), ()


def _is_here(name: str) -> bool:
    """Return whether an autoencoder is a local directory, or was downloaded before."""
    import huggingface_hub

    if name == "none" or Path(name).is_absolute():
        return True
    files = [
        huggingface_hub.try_to_load_from_cache(name, path)
        for path in ("config.json", "vae/config.json")
    ]
    return any(isinstance(file, str) for file in files)


def _grid(images: np.ndarray) -> Image.Image:
    """(B, S, S, C) uint8 => one picture of about as many rows as columns."""
    num_columns = math.ceil(math.sqrt(len(images)))
    num_rows = math.ceil(len(images) / num_columns)
    side = images.shape[1] + 2  # a border of one pixel
    sheet = np.full((num_rows * side, num_columns * side, images.shape[3]), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = number // num_columns * side + 1, number % num_columns * side + 1
        sheet[top : top + side - 2, left : left + side - 2] = image
    return Image.fromarray(sheet[..., 0] if sheet.shape[2] == 1 else sheet)


def _spread(num_images: int, num_chosen: int) -> np.ndarray:
    """Return indices spread evenly over the set."""
    return np.linspace(0, num_images - 1, min(num_images, num_chosen)).astype(np.int64)
