"""Images as they come about, in a row each, framed in the colour of the expert that drew them.

Shapes: R images, F moments of one, H W pixels, C channels; N = num_experts.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from remixdit.figures.grids import GAP, image_grid, small_font

__all__ = ["denoising_strips", "expert_colors"]

CELL = 112  # pixels: smaller images are enlarged to about this, so that their captions fit
BAR = 20  # pixels: height of the colour bar
MAX_NUMBERS = 25  # numbers of experts in the colour bar
KEY = "colour of an expert, from noise (left) to image (right)"


def expert_colors(num_experts: int) -> list[str]:
    """Return (N,) colours, dark for the noisiest: ordered in print and for the colour-blind."""
    shades = matplotlib.colormaps["viridis"](np.linspace(0.95, 0, num_experts))
    return [to_hex(shade) for shade in shades]


def denoising_strips(
    images: NDArray[np.uint8],
    timesteps: Sequence[float],
    experts: Sequence[int],
    num_experts: int,
    *,
    row_labels: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """Draw images at some moments of their trajectories, from noise (left) to the image (right).

    Args:
        images: (R, F, H, W, C) uint8.
        timesteps: (F,) timestep of each moment.
        experts: (F,) expert in [0, N) that took the step.
        num_experts: Number of experts, N. A single one has no colour.
        row_labels: (R,) text to the left of each row.
        title: Text above; what follows its first line is smaller.
    """
    rows, moments = images.shape[:2]
    mixed = num_experts > 1
    colors = expert_colors(num_experts)
    captions = [
        f"t = {timestep:.3g}" + f"\nexpert {expert}" * mixed
        for timestep, expert in zip(timesteps, experts, strict=True)
    ]
    grid = image_grid(
        images.reshape(rows * moments, *images.shape[2:]),
        moments,
        captions,
        row_labels=row_labels,
        scale=max(1, round(CELL / min(images.shape[2:4]))),
        title=title,
        frames=[colors[expert] for expert in experts] * rows if mixed else (),
    )
    return _with_key(grid, colors) if mixed else grid


def _with_key(grid: Image.Image, colors: Sequence[str]) -> Image.Image:
    """Add a bar below with the colour and the number of every expert, the noisiest first."""
    sheet = Image.new("RGB", (grid.width, grid.height + 2 * BAR + 5 * GAP), "white")
    sheet.paste(grid, (0, 0))
    pen, count = ImageDraw.Draw(sheet), len(colors)
    top = grid.height + 2 * GAP
    ends = np.linspace(2 * GAP, grid.width - 2 * GAP, count + 1)
    every = -(-count // MAX_NUMBERS)
    for place, expert in enumerate(reversed(range(count))):
        left, right = ends[place], ends[place + 1]
        pen.rectangle((left, top, right, top + BAR), fill=colors[expert])
        if expert % every == 0:
            middle = ((left + right) / 2, top + BAR / 2)
            ink = "black" if expert < count / 2 else "white"
            pen.text(middle, str(expert), fill=ink, font=small_font(), anchor="mm")
    pen.text((grid.width / 2, top + BAR + GAP), KEY, fill="black", font=small_font(), anchor="ma")
    return sheet
