"""What a run shows while it trains: the curves and pictures of TensorBoard, wandb and trackio.

A tracker is a package of its own, an extra. It gets what TensorBoard gets, and the configuration.
"""

import logging
import os
import re
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from remixdit.files import write_file
from remixdit.training.run import stated_settings

__all__ = ["Tracker", "check_installed", "pixels_of", "scalars_of"]

logger = logging.getLogger(__name__)

ID_FILE = "tracker-id"  # by which a resumed run goes on with the same run of the tracker
PROJECT = "remixdit"
CELL = 12  # pixels of one coefficient


def check_installed(tracker: str) -> None:
    """Refuse a tracker whose package is missing."""
    found = find_spec(tracker) if tracker else None
    # A mere folder of that name, such as wandb leaves behind, is a package without an origin.
    if tracker and (found is None or found.origin is None):
        raise ValueError(
            f"tracker must be installed, got {tracker}, which is not: "
            f"pip install 'remixdit[{tracker}]'"
        )


class Tracker:
    """A run of wandb or trackio.

    It ends with a warning when anything of it fails; training goes on.

    Args:
        name: wandb or trackio.
        directory: That of the run, which states its configuration.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.module: Any = None
        self.run: Any = None
        with self._only_warned():
            start = start_wandb if name == "wandb" else start_trackio
            self.module, self.run = start(directory, run_id(directory))

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Write one line of metrics."""
        self._log(scalars_of(row), row["step"])

    def add_coefficients(self, coefficients: np.ndarray, step: int) -> None:
        """Show (L, N, K) coefficients."""
        pixels = np.stack([pixels_of(coefficients)] * 3, -1)  # trackio takes (H, W, 3) alone
        self._log({"coefficients": pixels}, step)

    def add_samples(self, grid: np.ndarray, step: int) -> None:
        """Show a picture, (H, W, C) uint8."""
        self._log({"samples": grid}, step)

    def close(self) -> None:
        """Write all that is pending, and end the run of the tracker."""
        with self._only_warned():
            if self.run is not None:
                self.module.finish()
        self.run = None

    def _log(self, values: Mapping[str, float | np.ndarray], step: int) -> None:
        with self._only_warned():
            if self.run is None:
                return
            shown = {
                name: self.module.Image(value) if isinstance(value, np.ndarray) else value
                for name, value in values.items()
            }
            self.run.log(shown, step=step)

    @contextmanager
    def _only_warned(self) -> Iterator[None]:
        try:
            with redirect_stdout(sys.stderr):  # trackio greets
                yield
        except Exception as error:  # of whatever kind: nobody loses days of training for a curve
            self.run = None
            reason = str(error).rstrip(".")
            logger.warning("%s cannot be written: %s; training goes on", self.name, reason)


def start_wandb(directory: Path, identity: str) -> tuple[Any, Any]:
    """Return wandb, and a run of it that begins or goes on; WANDB_MODE=offline needs no network."""
    import wandb

    quiet = wandb.Settings(console="off", silent=True, init_timeout=30)  # and no question of a key
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=directory.resolve().name,
        id=identity,
        resume="allow",
        dir=str(directory),
        config=stated_settings(directory),
        settings=quiet,
    )
    return wandb, run


def start_trackio(directory: Path, identity: str) -> tuple[Any, Any]:
    """Return trackio, and a run of it that begins or goes on, which its name tells."""
    import trackio

    run = trackio.init(
        project=PROJECT,
        name=f"{directory.resolve().name}-{identity}",
        resume="allow",
        config=stated_settings(directory),
        embed=False,
    )
    return trackio, run


def run_id(directory: Path) -> str:
    """Return the identity of a run for trackers, the same for ever."""
    path = directory / ID_FILE
    stated = path.read_text("utf-8", errors="replace").strip() if path.is_file() else ""
    if not re.fullmatch("[0-9a-f]{12}", stated):
        stated = uuid.uuid4().hex[:12]
        write_file(path, partial(Path.write_text, data=f"{stated}\n"))
    return stated


def scalars_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the curves' values in a line of metrics; a list is a curve for each interval."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, list):
            parts = {f"{name}/{i:03d}": part for i, part in enumerate(value)}
        else:
            parts = {} if name == "step" else {name: value}
        found |= {label: part for label, part in parts.items() if part is not None}
    return found


def pixels_of(coefficients: np.ndarray) -> np.ndarray:
    """Return (L, N, K) coefficients as (H, W) uint8, white for 1.

    A row is a basis, a column an expert, and the tables of blocks stand one below the other. Plain
    pixels: drawing a figure takes as long as many steps of a small network.
    """
    tables = coefficients.clip(0, 1).transpose(0, 2, 1)  # (L, K, N)
    cells = (255 * np.concatenate(list(tables))).astype(np.uint8)
    return cells.repeat(CELL, axis=0).repeat(CELL, axis=1)
