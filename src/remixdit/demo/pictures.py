"""Arrays and frames => HTML: images, the heat map with the active expert, the strip.

Pictures are data URIs, so the server writes no files. The heat map is one pixel a cell, which the
browser enlarges; its labels are text, readable on a phone. Time runs from left to right: noise on
the left, so the columns are the experts in falling order.

Shapes: N experts, K bases, B images, H W C of one.
"""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["cell_pixels", "columns_for", "data_uri", "heat_map", "image_panel", "strip"]

SMALL = 128  # pixels: smaller images are shown as crisp squares
MAX_COLUMN_LABELS = 10
# Seven colours of matplotlib's cividis, from 0 to 1: told apart with any kind of colour blindness.
CIVIDIS = (
    (0, 34, 78),
    (42, 63, 109),
    (87, 93, 109),
    (125, 124, 120),
    (165, 156, 116),
    (210, 192, 96),
    (254, 232, 56),
)


def data_uri(pixels: NDArray[np.uint8], lossless: bool = True) -> str:
    """Return (H, W, 1 or 3) uint8 pixels as the source of an <img>."""
    kind, options = ("PNG", {"compress_level": 1}) if lossless else ("JPEG", {"quality": 85})
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    written = BytesIO()
    image.save(written, kind, **options)
    return f"data:image/{kind.lower()};base64,{b64encode(written.getvalue()).decode()}"


def picture(pixels: NDArray[np.uint8], alt: str, finished: bool) -> str:
    """Return an <img>; a large one that will soon be replaced is sent as JPEG."""
    small = len(pixels) < SMALL
    kind = "pixels" if small else "photo"
    source = data_uri(pixels, finished or small)
    return f'<img class="{kind}" decoding="sync" alt="{escape(alt)}" src="{source}">'


def image_panel(title: str, images: NDArray[np.uint8], names: Sequence[str], finished: bool) -> str:
    """Return the (B, H, W, C) images of one model under a title, each above its class."""
    cards = "".join(
        f"<figure>{picture(image, name, finished)}<figcaption>{escape(name)}</figcaption></figure>"
        for image, name in zip(images, names, strict=True)
    )
    return (
        f'<section class="panel"><h3>{escape(title)}</h3>'
        f'<div class="images" style="--columns: {columns_for(len(images))}">{cards}</div></section>'
    )


def columns_for(count: int) -> int:
    """Return the columns for a number of images, at most 4."""
    return min(count, 4) if count != 9 else 3


def cell_pixels(coefficients: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return (K, N, 3) colours of (N, K) coefficients, the noisiest expert first."""
    low, high = min(0.0, coefficients.min()), max(1.0, coefficients.max())
    shares = (coefficients.T[:, ::-1] - low) / (high - low)  # (K, N) in [0, 1]
    stops = np.linspace(0, 1, len(CIVIDIS))
    channels = [np.interp(shares, stops, values) for values in zip(*CIVIDIS, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def heat_map(coefficients: NDArray[np.float64], active: int | None = None) -> str:
    """Return the (N, K) coefficients, with a frame around those of the active expert."""
    experts, bases = coefficients.shape
    rows = "".join(f"<span>basis {basis}</span>" for basis in range(bases))
    mark = ""
    if active is not None:
        left, width = 100 * (experts - 1 - active) / experts, 100 / experts
        mark = f'<div class="active" style="left: {left:.3f}%; width: {width:.3f}%"></div>'
    every = -(-experts // MAX_COLUMN_LABELS)
    columns = "".join(
        f"<span>{expert if expert % every == 0 else ''}</span>" for expert in range(experts)[::-1]
    )
    low, high = min(0.0, coefficients.min()), max(1.0, coefficients.max())
    colours = ", ".join(f"rgb{colour}" for colour in CIVIDIS)
    return (
        f'<div class="map"><div class="rows">{rows}</div>'
        f'<div class="cells"><img class="pixels" style="height: {bases * 1.6:.1f}rem" '
        f'alt="coefficients of {bases} bases in {experts} experts" '
        f'src="{data_uri(cell_pixels(coefficients))}">{mark}</div>'
        f'<div></div><div class="columns">{columns}</div>'
        '<div></div><div class="axis"><span>noise</span><span>expert</span><span>image</span></div>'
        f'</div><p class="legend">share of a basis: {low:.2g} '
        f'<i style="background: linear-gradient(90deg, {colours})"></i> {high:.2g}</p>'
    )


def strip(
    images: Sequence[NDArray[np.uint8] | None], captions: Sequence[tuple[str, str]], title: str
) -> str:
    """Return small images in a row, each above its two words; None for one that is yet to come."""
    cells = []
    for image, (above, below) in zip(images, captions, strict=True):
        shown = '<div class="empty"></div>' if image is None else picture(image, above, False)
        text = f"<b>{escape(above)}</b><br>{escape(below)}" if above else "&nbsp;<br>&nbsp;"
        cells.append(f"<figure>{shown}<figcaption>{text}</figcaption></figure>")
    heading = f"<h4>{escape(title)}</h4>" if title else ""
    return f'{heading}<div class="strip">{"".join(cells)}</div>'
