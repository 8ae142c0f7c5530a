"""Sampled images on disk: a grid, an npz as ADM's evaluation takes it, or a file each.

    out.png     a grid with the classes below, and above what drew it
    out.npz     arr_0 (n, H, W, C) uint8, arr_1 (n,) int64 labels
    out/        000000.png, ..., and samples.json, which comes last

A single file appears when it is whole. Existing samples are replaced only on request: they take
hours, and two settings easily get the same name.

Shapes: n images, H W C of one.
"""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from remixdit.files import whole_file, write_file
from remixdit.sampling.sampler import Samples

__all__ = ["Target", "claim", "target_of", "write_about", "write_samples"]

ABOUT_FILE = "samples.json"


class Target(NamedTuple):
    """Path and kind of the output."""

    path: Path
    kind: str
    """png, npz or folder."""


def target_of(output: str) -> Target:
    """Return the target that name.png, name.npz or a directory means."""
    path, kind = Path(output), "folder"
    if not output.endswith("/") and not path.is_dir() and path.suffix:
        kind = path.suffix.removeprefix(".").lower()
    if kind not in ("png", "npz", "folder"):
        raise ValueError(f"output must be a .png, an .npz or a directory, got {output}")
    return Target(path, kind)


def claim(target: Target, overwrite: bool = False) -> None:
    """Check that samples can be written, before the first is drawn; a directory is made.

    Args:
        target: Path and kind of the output.
        overwrite: Whether to replace earlier samples.
    """
    if target.kind == "folder":
        claim_folder(target.path, overwrite)
    elif target.path.exists() and not overwrite:
        raise ValueError(f"output must not exist (--overwrite replaces it), got {target.path}")
    else:
        make_folder(target.path.parent)


def claim_folder(path: Path, overwrite: bool) -> None:
    """Make a directory, or remove earlier samples from one."""
    make_folder(path)
    found = sorted(entry.name for entry in path.iterdir())
    if found and not overwrite:
        raise ValueError(f"output must be empty (--overwrite replaces it), got {path}")
    for name in found:
        if name != ABOUT_FILE and not re.fullmatch(r"\d{6,}\.png", name):
            raise ValueError(f"output must hold nothing but samples, got {path / name}")
    for name in found:
        (path / name).unlink()


def make_folder(path: Path) -> None:
    """Make a directory; refuse a path below a file."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"output must be in a directory, got the file {path}") from error


def write_samples(
    target: Target,
    batches: Iterator[Samples],
    class_labels: Sequence[int],
    class_names: Sequence[str],
    title: str,
) -> Iterator[int]:
    """Write images as they are drawn; yield the number that this process has written.

    Args:
        target: Path and kind of the output, claimed.
        batches: Batches of images, in rising order; all of them unless the target is a folder.
        class_labels: (n,) labels of all images.
        class_names: Captions of the images of a grid; empty for none.
        title: What a grid says above its images.
    """
    if target.kind == "folder":
        yield from write_folder(target.path, batches)
    elif target.kind == "npz":
        yield from write_npz(target.path, batches, class_labels)
    else:
        yield from write_grid(target.path, batches, class_labels, class_names, title)


def write_about(target: Target, about: Mapping[str, Any]) -> None:
    """Write the settings of the samples, JSON values, beside the files of a folder."""
    if target.kind == "folder":
        text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
        write_file(target.path / ABOUT_FILE, lambda beside: beside.write_text(text, "utf-8"))


def write_folder(path: Path, batches: Iterator[Samples]) -> Iterator[int]:
    """Write a PNG for each image, named by its index."""
    done = 0
    for batch in batches:
        for index, image in zip(batch.indices, batch.images, strict=True):
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            write_file(path / f"{index:06}.png", partial(picture.save, format="png"))
        done += len(batch.indices)
        yield done


def write_npz(path: Path, batches: Iterator[Samples], class_labels: Sequence[int]) -> Iterator[int]:
    """Write arr_0 and arr_1, batch by batch: 50,000 images need not fit into memory."""
    labels = np.asarray(class_labels, np.int64)
    with whole_file(path) as beside, zipfile.ZipFile(beside, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            yield from write_rows(file, batches, len(labels))
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels)


def write_rows(file: IO[bytes], batches: Iterator[Samples], count: int) -> Iterator[int]:
    """Write the images of `count` samples as one .npy."""
    done = 0
    for batch in batches:
        if not done:
            shape = (count, *batch.images.shape[1:])
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(batch.images).data)
        done += len(batch.indices)
        yield done


def write_grid(
    path: Path,
    batches: Iterator[Samples],
    class_labels: Sequence[int],
    class_names: Sequence[str],
    title: str,
) -> Iterator[int]:
    """Write all images as one picture, class after class in its columns where that is possible."""
    from remixdit.figures.fonts import class_texts
    from remixdit.figures.grids import image_grid, near_square

    images: list[np.ndarray] = []
    for batch in batches:
        images.extend(batch.images)
        yield len(images)
    columns = near_square(len(images), len(set(class_labels)))
    captions = class_texts(class_labels, class_names)
    grid = image_grid(np.stack(images), columns, captions, title=title)
    write_file(path, partial(grid.save, format="png"))
