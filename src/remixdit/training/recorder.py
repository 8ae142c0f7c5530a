"""The files of a run in progress: metrics, curves, samples, checkpoints, the model.

The first process writes. All processes gather sharded tensors, so all of them call this.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from remixdit import distributed
from remixdit.data.autoencoder import Autoencoder
from remixdit.distributed.parallel import whole
from remixdit.files import write_file
from remixdit.training import checkpoint
from remixdit.training.config import TrainConfig
from remixdit.training.run import COEFFICIENTS_FILE, append_metrics, cut_metrics
from remixdit.training.trackers import Tracker, pixels_of, scalars_of
from remixdit.training.trainer import Training

__all__ = ["Board", "Recorder", "is_due"]

logger = logging.getLogger(__name__)

ALL_TABLES = 6  # the first 2^6 lines of metrics have a table of coefficients each


def is_due(step: int, config: TrainConfig, *every: int) -> bool:
    """Whether an action that is due every so many steps, and at the end, is due now."""
    return step == config.steps or any(each and step % each == 0 for each in every)


class Recorder:
    """Writes the files that are due after a step.

    Args:
        config: The run.
        training: Run in progress.
    """

    def __init__(self, config: TrainConfig, training: Training) -> None:
        self.config, self.training = config, training
        self.writes = training.ranks.is_first
        # Only sharded tensors cost the other processes anything: all of them gather.
        self.joins = self.writes or training.is_sharded
        self.first_step = training.step
        mixed = training.model.config
        self.has_table = mixed.num_bases > 1 and mixed.coefficients != "one_hot"
        self.lacks_samples = False
        self.boards: list[Board | Tracker] = []
        self.writer = checkpoint.Writer(config.output_dir, config.output.keep_checkpoints)
        if self.writes:
            cut_metrics(config.output_dir, training.step)
            if self.has_table:  # that of the start is written again
                cut_metrics(config.output_dir, training.step or -1, COEFFICIENTS_FILE)
            if config.output.tensorboard:
                self.boards.append(Board(config.output_dir, training.step))
            if config.output.tracker:
                self.boards.append(Tracker(config.output.tracker, config.output_dir))
        if self.joins and self.has_table and training.step == 0:
            self._write_coefficients()

    def record(self, metrics: dict[str, Any] | None, saves: bool) -> None:
        """Write what is due after a step: a line of metrics, samples, a checkpoint."""
        self.writer.check()
        if metrics is not None and self.joins:
            self._write_metrics(metrics)
        self.draw()
        if self.joins and saves:
            self._write_checkpoint()

    def begin(self) -> None:
        """Write the grid of the start, if one is due."""
        if not self.first_step:
            self.draw()

    def draw(self) -> None:
        """Write a grid of samples, if one is due."""
        output, training = self.config.output, self.training
        if not (self.joins and output.samples_at(training.step, self.config.steps)):
            return
        autoencoder = self._autoencoder()
        if autoencoder is not None:
            self._write_samples(autoencoder)

    def finish(self) -> None:
        """Write the finished model, after the last checkpoint is whole."""
        self.writer.wait()
        training = self.training
        if not self.joins:
            return
        parts = checkpoint.gathered(
            training.model, training.optimizer, training.average, self.writes, only="ema"
        )
        if self.writes:
            checkpoint.write_model(
                self.config.output_dir / "model", training.model.config, parts["ema"]
            )

    def saved_note(self) -> str:
        """Return which checkpoint was written last."""
        return "" if self.writer.saved is None else f"saved step {self.writer.saved}"

    def close(self) -> None:
        """End the writer's thread, and raise an error that happened there."""
        try:
            self.writer.close()  # first: a tracker may wait for the network
        finally:
            for board in self.boards:
                board.close()

    def _write_checkpoint(self) -> None:
        training = self.training
        parts = checkpoint.gathered(
            training.model, training.optimizer, training.average, self.writes
        )
        if self.writes:
            skipped = training.skipped.total()
            self.writer.write(training.step, training.model.config, parts, skipped)

    def _write_metrics(self, metrics: dict[str, Any]) -> None:
        if self.has_table and is_due(self.training.step, self.config, self._tables_every()):
            self._write_coefficients()
        tables = self._coefficients()
        if not self.writes:
            return
        append_metrics(self.config.output_dir, metrics)
        for board in self.boards:
            board.add_metrics(metrics)
            if self.training.model.num_bases > 1:
                board.add_coefficients(tables, self.training.step)

    def _autoencoder(self) -> Autoencoder | None:
        """Return what decodes samples; None where grids are drawn by default and it is not here."""
        by_default = self.config.output.sample_every is None
        found, reason = None, "another process cannot"
        try:
            found = self.training.autoencoder(offline=by_default)
        except ValueError as error:
            if not by_default:  # asked for
                raise
            reason = str(error)
        if self.training.is_sharded:  # all draw or none does, as sharded weights are gathered
            able = torch.tensor(float(found is not None), device=self.training.device)
            distributed.all_reduce([able])
            found = found if able == self.training.ranks.num_ranks else None
        if found is None and self.writes and not self.lacks_samples:
            logger.warning("no pictures of samples are drawn: %s", reason)
            self.lacks_samples = True
        return found

    def _tables_every(self) -> int:
        """Return the steps between tables: twice as many whenever the run is twice as long.

        So a run of any length has few, and which ones does not depend on when it is to end.
        """
        log_every = self.config.output.log_every
        lines = self.training.step // log_every
        return log_every * 2 ** max(0, lines.bit_length() - ALL_TABLES)

    def _write_coefficients(self) -> None:
        """Add a line with the mean of the tables, rounded: some are large."""
        rows = self._coefficients().mean(0).astype(float).round(4).tolist()
        if self.writes:
            row = {"step": self.training.step, "coefficients": rows}
            append_metrics(self.config.output_dir, row, COEFFICIENTS_FILE)

    def _coefficients(self) -> np.ndarray:
        """Return the (L, N, K) coefficients; if they are sharded, all processes gather them."""
        experts = self.training.model.experts
        return experts.coefficients(logits=whole(experts.logits.detach())).cpu().numpy()

    def _write_samples(self, autoencoder: Autoencoder) -> None:
        from remixdit.figures.grids import image_grid, near_square

        images, names, summary = self.training.sample(autoencoder)
        if not self.writes:
            return
        columns = near_square(len(images), len(set(names)) or 1)
        step = f"step {self.training.step:,} of {self.config.steps:,}"
        title = f"{self.config.output_dir.absolute().name}, {step}\n{summary}"
        grid = image_grid(images, columns, names, title=title)
        path = self.config.output_dir / "samples" / f"step-{self.training.step:08d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            write_file(path, partial(grid.save, format="png"))
        except OSError as error:
            if not self.lacks_samples:  # nobody loses days of training for a picture
                logger.warning("%s cannot be written: %s; training goes on", path, error.strerror)
            self.lacks_samples = True
        for board in self.boards:
            board.add_samples(np.array(grid), self.training.step)


class Board:
    """TensorBoard curves, coefficients and samples of a run.

    They end with a warning when they cannot be written; training goes on.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        self.directory = directory / "tensorboard"
        self.excepthook = threading.excepthook
        # Its thread raises what it met in our next call too, where it becomes a warning.
        threading.excepthook = self._hear
        from torch.utils.tensorboard import SummaryWriter

        self.writer: SummaryWriter | None = None
        with self._only_warned():
            self.writer = SummaryWriter(str(self.directory), purge_step=first_step)

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Write one line of metrics."""
        for name, value in scalars_of(row).items():
            self._add("add_scalar", name, value, row["step"])

    def add_coefficients(self, coefficients: np.ndarray, step: int) -> None:
        """Show (L, N, K) coefficients."""
        pixels = pixels_of(coefficients)
        self._add("add_image", "coefficients", pixels, step, dataformats="HW")

    def add_samples(self, grid: np.ndarray, step: int) -> None:
        """Show a picture, (H, W, C) uint8."""
        self._add("add_image", "samples", grid, step, dataformats="HWC")

    def close(self) -> None:
        """Write all pending events."""
        if self.writer is not None:
            with self._only_warned():
                self.writer.close()
        threading.excepthook = self.excepthook

    def _hear(self, error: threading.ExceptHookArgs) -> None:
        if type(error.thread).__module__.partition(".")[0] != "tensorboard":
            self.excepthook(error)

    def _add(self, method: str, *facts: Any, **options: Any) -> None:
        if self.writer is not None:
            with self._only_warned():
                getattr(self.writer, method)(*facts, **options)

    @contextmanager
    def _only_warned(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.writer = None
            reason = error.strerror or error
            logger.warning("%s cannot be written: %s; training goes on", self.directory, reason)
