"""The coefficients over a run, as a GIF that any page shows.

Shapes: S tables, N = num_experts, K = num_bases.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from os import PathLike

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from remixdit.figures.axes import plain, write_cells
from remixdit.figures.plots import coefficients_heatmap

__all__ = ["Animation"]

MAX_FRAMES = 60
DPI = 90  # a GIF of 60 frames stays below a megabyte
FIRST_MS, FRAME_MS, LAST_MS = 800, 100, 2500


@dataclass(frozen=True)
class Animation:
    """A heat map of coefficients that changes with the steps of a run."""

    tables: NDArray[np.float64]
    """(S, N, K) coefficients."""
    steps: Sequence[int]
    """(S,) number of optimizer steps at each."""
    boundaries: ArrayLike
    """(N + 1,) ends of the intervals."""
    title: str
    """Title, to which the step is added."""

    def save(self, path: str | PathLike[str]) -> None:
        """Write the tables of about 60 evenly spaced steps as a GIF that repeats itself."""
        first, *others = _with_one_palette(list(self._pictures()))
        times = [FIRST_MS, *[FRAME_MS] * (len(others) - 1), LAST_MS]
        first.save(path, format="GIF", save_all=True, append_images=others, duration=times, loop=0)

    def _pictures(self) -> Iterator[Image.Image]:
        """Draw a figure once, and yield it with each table in turn."""
        low, high = min(0.0, self.tables.min()), max(1.0, self.tables.max())
        figure = coefficients_heatmap(self.tables[-1], self.boundaries, title=self.title)
        figure.set_dpi(DPI)
        axes = figure.axes[0]
        image = axes.images[0]
        image.set_clim(low, high)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # nothing moves from frame to frame
        wanted = np.linspace(self.steps[0], self.steps[-1], MAX_FRAMES)
        for place in np.unique(np.searchsorted(self.steps, wanted - 1e-6)):
            table = self.tables[place].T  # (K, N)
            image.set_data(table)
            for text in list(axes.texts):
                text.remove()
            write_cells(axes, image, table, "{:.2f}".format)
            step = f", step {self.steps[place]:,} of {self.steps[-1]:,}"
            room = int(10 * figure.get_figwidth()) - len(step)
            figure.suptitle(plain(self.title, room) + step, x=0.01, ha="left")
            drawn = BytesIO()
            figure.savefig(drawn, format="png", dpi=DPI)
            yield Image.open(drawn).convert("RGB")


def _with_one_palette(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Reduce pictures to 256 colours, the same in all, so that what stays is not stored again."""
    width, height = pictures[0].size
    chosen = [pictures[0], pictures[len(pictures) // 2], pictures[-1]]
    sheet = Image.new("RGB", (width, 3 * height))
    for row, picture in enumerate(chosen):
        sheet.paste(picture, (0, row * height))
    palette = sheet.quantize(256)
    colors = np.array(palette.getpalette()).reshape(-1, 3)
    colors[colors.min(1) > 247] = 255  # that of the paper is a little grey
    found = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    for picture in found:
        picture.putpalette(colors.ravel().tolist())
    return found
