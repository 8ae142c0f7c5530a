"""Images laid out in a grid, with their names, and a title that says what they are.

Shapes: n images, H W pixels, C channels.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from remixdit.figures.fonts import font_file, with_letters

__all__ = ["image_grid", "near_square", "small_font"]

GAP = 3  # pixels between two images of a grid
MIN_CELL = 64  # pixels: smaller images are enlarged to at least this
FONT_SIZE, TITLE_SIZE = 14, 17  # pixels
LINE = FONT_SIZE + 3  # pixels from one line of text to the next
MAX_MARGIN = 240  # pixels for the labels of rows
LEAST_LETTERS = 3  # of a broken word, before its hyphen and after
END_OF_LATIN = "\u0250"  # letters below it are European, and words of them have hyphens
FRAME = 5  # pixels of colour around an image
GREY = "#555555"  # what is written below the title


def near_square(count: int, classes: int = 1) -> int:
    """Return the columns of a grid of `count` images that cycle through some classes.

    The grid is as square as it can be with whole cycles in its rows, if its sides then
    differ by a factor of 2.6 at most; otherwise it is as square as any.
    """
    side = count**0.5
    whole = [n for n in range(classes, count + 1, classes) if side / 1.6 <= n <= 1.6 * side]
    return min(whole, key=lambda n: abs(n - side)) if whole else max(1, round(side))


def image_grid(
    images: NDArray[np.uint8],
    columns: int,
    labels: Sequence[str] = (),
    *,
    row_labels: Sequence[str] = (),
    scale: int = 0,
    title: str = "",
    frames: Sequence[str] = (),
) -> Image.Image:
    """Lay images out in rows with thin gaps between them.

    Args:
        images: (n, H, W, C) uint8, C is 1 or 3.
        columns: Number of images in a row, at least 1.
        labels: One text per image, written below it in at most two lines; or one per column,
            written below the last row.
        row_labels: One text per row, written to its left.
        scale: Each pixel becomes scale x scale pixels; 0 for just enough to reach 64 a side.
        title: Text above the grid; what follows its first line is smaller.
        frames: One colour per image, drawn around it.
    """
    _check(images, columns, labels, row_labels, frames)
    scale = scale or -(-MIN_CELL // min(images.shape[1:3]))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2).repeat(3 // images.shape[3], axis=3)
    border = FRAME if frames else 0
    height, width = (side + 2 * border for side in images.shape[1:3])
    texts = [_wrapped(label, width) for label in labels]
    below = 4 + LINE * max(map(len, texts)) if texts else 0
    is_of_columns = len(texts) == columns
    pitch = height + GAP + (0 if is_of_columns else below)
    margin = min(MAX_MARGIN, 3 * GAP + max(map(_length, row_labels))) if row_labels else 0
    rows = -(-len(images) // columns)
    size = (margin + GAP + columns * (width + GAP), GAP + rows * pitch + below * is_of_columns)
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    for index, image in enumerate(images):
        left, top = margin + GAP + index % columns * (width + GAP), GAP + index // columns * pitch
        if frames:
            pen.rectangle((left, top, left + width - 1, top + height - 1), fill=frames[index])
        grid.paste(Image.fromarray(image), (left + border, top + border))
    for index, lines in enumerate(texts):
        row = rows - 1 if is_of_columns else index // columns
        middle = margin + GAP + index % columns * (width + GAP) + width / 2
        _write(pen, lines, (middle, GAP + row * pitch + height + 2))
    for row, text in enumerate(row_labels):
        _write_beside(pen, text, margin, GAP + row * pitch + height / 2)
    return _titled(grid, title) if title else grid


def _check(
    images: NDArray[np.uint8],
    columns: int,
    labels: Sequence[str],
    row_labels: Sequence[str],
    frames: Sequence[str],
) -> None:
    """Refuse images of another kind, and texts or colours that are too few or too many."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images must be (n, H, W, 1 or 3) uint8, got {images.shape}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    count = len(images)
    for name, given, wanted in (
        ("labels", labels, columns if len(labels) == columns else count),
        ("row_labels", row_labels, -(-count // columns)),
        ("frames", frames, count),
    ):
        if len(given) not in (0, wanted):
            raise ValueError(f"{name} must hold {wanted} texts, got {len(given)}")


def _write_beside(pen: ImageDraw.ImageDraw, text: str, margin: int, middle: float) -> None:
    """Write the label of a row into the margin to its left."""
    shown = _cut(text, margin - 2 * GAP)
    pen.text((margin - GAP, middle), shown, fill="black", font=_font(shown), anchor="rm")


def _write(pen: ImageDraw.ImageDraw, lines: Sequence[str], place: tuple[float, float]) -> None:
    """Write lines below a place, each with it in the middle."""
    for line, text in enumerate(lines):
        spot = (place[0], place[1] + line * LINE)
        pen.text(spot, text, fill="black", font=_font(text), anchor="ma")


def _titled(grid: Image.Image, title: str) -> Image.Image:
    """Write a title above a grid, which becomes wider if it is narrower than a word."""
    width = max(grid.width, 2 * MAX_MARGIN)
    first, *others = title.split("\n")
    head = _wrapped(first, width - 4 * GAP, TITLE_SIZE)
    small = [line for other in others for line in _wrapped(other, width - 4 * GAP, lines=3)]
    above = 2 * GAP + len(head) * (TITLE_SIZE + 5) + len(small) * LINE + GAP
    sheet = Image.new("RGB", (width, above + grid.height), "white")
    pen, top = ImageDraw.Draw(sheet), 2 * GAP
    for text in head:
        pen.text((2 * GAP, top), text, fill="black", font=_font(text, TITLE_SIZE))
        top += TITLE_SIZE + 5
    for text in small:
        pen.text((2 * GAP, top), text, fill=GREY, font=_font(text))
        top += LINE
    sheet.paste(grid, (0, above))
    return sheet


def small_font() -> ImageFont.FreeTypeFont:
    """Return the font of labels, for digits and Latin letters."""
    return _font("")


def _font(text: str, size: int = FONT_SIZE) -> ImageFont.FreeTypeFont:
    return _opened(font_file(text), size)


@cache
def _opened(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _length(text: str, size: int = FONT_SIZE) -> int:
    return int(_font(text, size).getlength(text)) + 1


def _wrapped(text: str, room: float, size: int = FONT_SIZE, lines: int = 2) -> list[str]:
    """Return a text as lines of at most `room` pixels; the last of them ends in an ellipsis."""
    found: list[str] = []
    for paragraph in text.split("\n"):
        rest = with_letters(paragraph).split()
        while rest and len(found) < lines - 1:
            count = len(rest)
            while count > 1 and _length(" ".join(rest[:count]), size) > room:
                count -= 1
            if _length(rest[0], size) > room:  # a word, or a text of a script without spaces
                rest[:1] = _broken(rest[0], room, size)
            found.append(" ".join(rest[:count]))
            rest = rest[count:]
        if rest:
            found.append(_cut(" ".join(rest), room, size))
    return found


def _broken(word: str, room: float, size: int) -> list[str]:
    """Return a word in two parts, of which the first fits into some pixels."""
    letters = word.rstrip(",.;:")
    split = min(_fitting(word, room - _length("-", size), size), len(letters) - LEAST_LETTERS)
    if letters.isalpha() and max(letters) < END_OF_LATIN and split >= LEAST_LETTERS:
        return [word[:split] + "-", word[split:]]
    split = _fitting(word, room, size)
    return [word[:split], word[split:]]


def _fitting(text: str, room: float, size: int) -> int:
    """Return how many letters, at least 1, fit into some pixels."""
    count = len(text)
    while count > 1 and _length(text[:count], size) > room:
        count -= 1
    return count


def _cut(text: str, room: float, size: int = FONT_SIZE) -> str:
    """Return a text that fits into `room` pixels, cut off with an ellipsis if it has to be."""
    shown = with_letters(text)
    while _length(shown, size) > room and len(shown) > 1:
        shown = shown.rstrip("…")[:-1] + "…"
    return shown
