"""Images laid out in a grid, with their names.

Shapes: n images, H W pixels, C channels.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["image_grid"]

GAP = 3  # pixels between two images of a grid
MIN_CELL = 64  # pixels: smaller images are enlarged to at least this
FONT_SIZE = 14  # pixels
MAX_MARGIN = 240  # pixels for the labels of rows


def image_grid(
    images: NDArray[np.uint8],
    columns: int,
    labels: Sequence[str] = (),
    *,
    row_labels: Sequence[str] = (),
    scale: int = 0,
) -> Image.Image:
    """Lay images out in rows with thin gaps between them.

    Args:
        images: (n, H, W, C) uint8, C is 1 or 3.
        columns: Number of images in a row, at least 1.
        labels: One text per image, written below it, shortened to its width.
        row_labels: One text per row, written to its left.
        scale: Each pixel becomes scale x scale pixels; 0 for just enough to reach 64 a side.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images must be (n, H, W, 1 or 3) uint8, got {images.shape}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    rows = -(-len(images) // columns)
    for name, texts, count in (("labels", labels, len(images)), ("row_labels", row_labels, rows)):
        if len(texts) not in (0, count):
            raise ValueError(f"{name} must hold {count} texts, got {len(texts)}")
    scale = scale or -(-MIN_CELL // min(images.shape[1:3]))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2).repeat(3 // images.shape[3], axis=3)
    height, width = images.shape[1:3]
    widest = max((_font(text).getlength(text) for text in row_labels), default=-3 * GAP)
    margin = min(MAX_MARGIN, int(widest) + 3 * GAP)
    pitch = height + GAP + (FONT_SIZE + 6 if labels else 0)
    grid = Image.new("RGB", (margin + GAP + columns * (width + GAP), GAP + rows * pitch), "white")
    for index, image in enumerate(images):
        left, top = margin + GAP + index % columns * (width + GAP), GAP + index // columns * pitch
        grid.paste(Image.fromarray(image), (left, top))
        if labels:
            _write(grid, labels[index], (left + width / 2, top + height + 2), width, "ma")
    for row, text in enumerate(row_labels):
        _write(grid, text, (margin - GAP, GAP + row * pitch + height / 2), margin - 2 * GAP, "rm")
    return grid


@cache
def _font(text: str) -> ImageFont.FreeTypeFont:
    """Return DejaVu, or a font of this machine that has the letters DejaVu lacks."""
    letters = {ord(letter) for letter in text}
    dejavu = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    ordered = sorted(fontManager.ttflist, key=lambda font: (str(font.weight) != "400", font.fname))
    # Pillow cannot scale emoji of fixed size; the font of last resort draws only boxes.
    usable = [f.fname for f in ordered if not re.search("emoji|lastresort", f.fname.lower())]
    complete = (f for f in [dejavu, *usable] if letters <= FT2Font(f).get_charmap().keys())
    return ImageFont.truetype(next(complete, dejavu), FONT_SIZE)


def _write(
    grid: Image.Image, text: str, place: tuple[float, float], room: float, anchor: str
) -> None:
    """Write one line, cut off with an ellipsis where it is wider than `room` pixels."""
    font, shown = _font(text), text
    while font.getlength(shown) > room and len(shown) > 1:
        shown = shown.rstrip("…")[:-1] + "…"
    ImageDraw.Draw(grid).text(place, shown, fill="black", font=font, anchor=anchor)
