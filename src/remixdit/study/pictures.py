"""The same noise and labels through every variant, a row each.

Shapes: n images, H W C of one.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from remixdit.figures.fonts import class_texts
from remixdit.figures.grids import image_grid
from remixdit.figures.html import Block, Heading, Picture
from remixdit.files import write_file
from remixdit.study.config import GRID_IMAGES

__all__ = ["rows_of_images", "samples_of_variants", "save_samples"]

SAMPLES_FILE = "samples.npz"
COLUMNS = 10


def save_samples(
    directory: Path,
    images: NDArray[np.uint8],
    class_labels: Sequence[int],
    class_names: Sequence[str],
    summary: str,
) -> None:
    """Write the first images of a cell, with their classes and how they were drawn.

    Args:
        directory: Directory of the cell.
        images: (n, H, W, C) uint8.
        class_labels: (n,) labels.
        class_names: Name of every class; empty for none.
        summary: Settings of the sampler, in one line.
    """
    names = class_texts(class_labels[:GRID_IMAGES], class_names)

    def write(beside: Path) -> None:
        with beside.open("wb") as file:  # np.savez would add a suffix
            np.savez_compressed(file, images=images[:GRID_IMAGES], names=names, summary=summary)

    write_file(directory / SAMPLES_FILE, write)


def samples_of_variants(directory: Path, results: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Write samples.png, and return it as a part of the report; nothing without samples.

    Args:
        directory: Directory of the study.
        results: Results of the finished cells. Of each variant, the first seed is shown.
    """
    found: dict[str, NDArray[np.uint8]] = {}
    names: list[str] = []
    summary = ""
    for result in sorted(results, key=lambda result: result["seed"]):
        name = result["variant"]
        path = directory / "cells" / name / f"seed-{result['seed']}" / SAMPLES_FILE
        if name not in found and path.is_file():
            with np.load(path) as file:
                found[name] = file["images"]
                names, summary = file["names"].tolist(), str(file["summary"])
    if not found:
        return []
    order = [
        name for name in dict.fromkeys(result["variant"] for result in results) if name in found
    ]
    title = f"{directory.name}: the same noise through every variant\n{summary}"
    sheet = rows_of_images({name: found[name] for name in order}, names, title)
    write_file(directory / "samples.png", partial(sheet.save, format="png"))
    caption = "Samples from the same noise and labels; a row a variant, of its first seed."
    return [Heading("Samples"), Picture(sheet, caption, "Grid of samples, a row a variant")]


def rows_of_images(
    images: Mapping[str, NDArray[np.uint8]], names: Sequence[str], title: str
) -> Image.Image:
    """Draw the first 10 images of every model below each other.

    Args:
        images: Name of a model -> (n, H, W, C) uint8, from the same noise for all.
        names: (n,) classes, written below the last row; empty for none.
        title: Text above; what follows its first line is smaller.
    """
    rows = [own[:COLUMNS] for own in images.values()]
    columns = len(rows[0])
    return image_grid(
        np.concatenate(rows), columns, names[:columns], row_labels=list(images), title=title
    )
