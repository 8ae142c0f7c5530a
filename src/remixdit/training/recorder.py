"""The files of a run in progress: metrics, curves, samples, checkpoints, the model.

The first process writes. All processes gather sharded tensors, so all of them call this.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from remixdit.distributed.parallel import whole
from remixdit.training import checkpoint
from remixdit.training.config import TrainConfig
from remixdit.training.run import append_metrics, cut_metrics
from remixdit.training.trainer import Training

__all__ = ["Board", "Recorder", "is_due"]

CELL = 12  # pixels of one coefficient on TensorBoard


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
        self.board: Board | None = None
        self.writer = checkpoint.Writer(config.output_dir, config.output.keep_checkpoints)
        if self.writes:
            cut_metrics(config.output_dir, training.step)
            if config.output.tensorboard:
                self.board = Board(config.output_dir, training.step)

    def record(self, metrics: dict[str, Any] | None) -> None:
        """Write the files that are due after a step."""
        output, step = self.config.output, self.training.step
        if metrics is not None and self.joins:
            self._write_metrics(metrics)
        if output.sample_every and self.joins and is_due(step, self.config, output.sample_every):
            self._write_samples()
        if self.joins and is_due(step, self.config, output.save_every):
            self._write_checkpoint()

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

    def close(self) -> None:
        """End the writer's thread, and raise an error that happened there."""
        if self.board:
            self.board.close()
        self.writer.close()

    def _write_checkpoint(self) -> None:
        training = self.training
        parts = checkpoint.gathered(
            training.model, training.optimizer, training.average, self.writes
        )
        if self.writes:
            skipped = training.skipped.total()
            self.writer.write(training.step, training.model.config, parts, skipped)

    def _write_metrics(self, metrics: dict[str, Any]) -> None:
        tables = whole(self.training.model.experts.logits.detach())  # by all, if it is sharded
        if not self.writes:
            return
        append_metrics(self.config.output_dir, metrics)
        if not self.board:
            return
        self.board.add_metrics(metrics)
        if self.training.model.num_bases > 1:
            coefficients = self.training.model.experts.coefficients(logits=tables)
            self.board.add_coefficients(coefficients.cpu().numpy(), self.training.step)

    def _write_samples(self) -> None:
        from remixdit.figures.grids import image_grid

        images, names = self.training.sample()
        if not self.writes:
            return
        grid = image_grid(images, 8, names)
        directory = self.config.output_dir / "samples"
        directory.mkdir(exist_ok=True)
        grid.save(directory / f"step-{self.training.step:08d}.png")
        if self.board:
            self.board.add_samples(np.array(grid), self.training.step)


class Board:
    """TensorBoard curves, coefficients and samples of a run."""

    def __init__(self, directory: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Write one line of metrics; a list becomes one curve for each interval."""
        for name, value in row.items():
            if isinstance(value, list):
                for i, part in enumerate(value):
                    if part is not None:
                        self._scalar(f"{name}/{i:03d}", part, row["step"])
            elif name != "step" and value is not None:
                self._scalar(name, value, row["step"])

    def add_coefficients(self, coefficients: np.ndarray, step: int) -> None:
        """Show (L, N, K) coefficients: a row for each basis, a column for each expert, white for 1.

        Plain pixels: drawing a figure takes as long as many steps of a small network.
        """
        tables = coefficients.clip(0, 1).transpose(0, 2, 1)  # (L, K, N)
        cells = (255 * np.concatenate(list(tables))).astype(np.uint8)
        pixels = cells.repeat(CELL, axis=0).repeat(CELL, axis=1)
        self.writer.add_image("coefficients", pixels, step, dataformats="HW")

    def add_samples(self, grid: np.ndarray, step: int) -> None:
        """Show a picture, (H, W, C) uint8."""
        self.writer.add_image("samples", grid, step, dataformats="HWC")

    def close(self) -> None:
        """Write all pending events."""
        self.writer.close()

    def _scalar(self, name: str, value: float, step: int) -> None:
        self.writer.add_scalar(name, value, step)
