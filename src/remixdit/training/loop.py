"""Training: one loop for plain, remixed, one-hot and independent experts.

    plan the step from (seed, step): experts, timesteps, noise, dropped labels
    for each expert: mix it into the network, run its images, take in the plain gradient
    one update of bases, shared parameters and logits, and of their average

A run is a directory:

    config.json       the configuration, and what the data were
    metrics.jsonl     a line every log_every steps
    checkpoints/      the newest few
    samples/          grids of images from the averaged weights
    tensorboard/
    model/            the averaged weights, when the run has finished

Shapes: C H W latents.
"""

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from remixdit import distributed
from remixdit.data import Batch, EncodeConfig, Loader, ShardDataset, check_batch_size, prepare
from remixdit.data.autoencoder import load_autoencoder
from remixdit.distributed.ranks import Ranks
from remixdit.first.optim import MixtureAdamW
from remixdit.first.sharding import shared_out
from remixdit.first.stacking import ExpertStack, stacks
from remixdit.model.loading import newest_checkpoint
from remixdit.model.model import RemixDiT
from remixdit.progress import Progress as Encoded
from remixdit.progress import finish
from remixdit.sampling.sampler import SamplingConfig, sample
from remixdit.training import checkpoint
from remixdit.training.config import MAY_CHANGE, PRECISIONS, TrainConfig
from remixdit.training.run import DATA_DIR, Board, append_metrics, check_run, claim_run, cut_metrics
from remixdit.training.start import (
    outline_of,
    settings_of,
    starting_model,
    stretched_schedules,
    training_strata,
)
from remixdit.training.step import StepPlan, Window, plan_step, step_inputs, train_step

__all__ = ["Progress", "Training", "train"]

logger = logging.getLogger(__name__)


Report = Callable[[Encoded], None]


class Progress(NamedTuple):
    """What a run reports after every step."""

    step: int
    """Steps done."""
    steps: int
    experts: tuple[int, ...]
    """Of this step."""
    metrics: dict[str, Any] | None
    """The line of metrics, when one was written."""


class Training:
    """A run in progress: the model, its optimizer and the data."""

    def __init__(
        self, config: TrainConfig, model: RemixDiT, dataset: ShardDataset, ranks: Ranks
    ) -> None:
        self.config, self.ranks = config, ranks
        self.device = distributed.pick_device(config.device)
        if config.shard and ranks.num_ranks > 1:  # first, as a GPU may not hold the whole
            model.mixture.shard(shared_out(self.device.type, config.shard_size or ranks.num_ranks))
        self.model = model.to(self.device)
        self.optimizer = MixtureAdamW(
            self.model.mixture, config.optimizer, compile=config.compile or None
        )
        self.model.mixture.cast_network(PRECISIONS[config.precision])
        self.model.network.recompute = config.recompute
        if config.compile:
            self.model.network.compile()
        self.strata = training_strata(self.model, config)
        self.loader = Loader(
            dataset,
            config.batch_size,
            seed=config.seed,
            mirror=config.objective.mirror,
            rank=ranks.rank,
            num_ranks=ranks.num_ranks,
        )
        self.stack: ExpertStack | None = None
        experts = config.strata_per_step if self.model.num_experts > 1 else 1
        if not config.takes_turns and stacks(self.model.mixture, experts):
            self.stack = ExpertStack(self.optimizer.gradients, experts)
        self.step = 0
        self.reduced_bytes = 0  # of gradients, in the last step
        self.window = self._new_window()

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        newest = newest_checkpoint(self.config.output_dir)
        if newest is not None:
            self.step = checkpoint.restore(newest, self.model, self.optimizer)

    def take_step(self, batch: Batch) -> StepPlan:
        """Take one optimizer step."""
        config = self.config
        plan = plan_step(
            self.strata, config.strata_per_step, config.batch_size, config.seed, self.step
        )
        inputs = step_inputs(self.model, batch, plan, config)
        gradients, micro = self.optimizer.gradients, config.micro_batch_size
        train_step(self.model, gradients, inputs, plan, self.window, self.stack, micro)
        self._reduce()
        strength = config.mixture.prior_at(self.step, config.steps)
        self.window.add_stats(self.optimizer.step(self.step, config.steps, strength))
        self.step += 1
        return plan

    def _reduce(self) -> None:
        """Sum the gradients of all processes, or this process's slice of them."""
        gradients, sharding = self.optimizer.gradients, self.model.mixture.sharding
        if sharding is not None:
            gradients.slice_grads()
            self.reduced_bytes, sharding.reduced_bytes = sharding.reduced_bytes, 0
        elif self.ranks.num_ranks > 1:
            self.reduced_bytes = distributed.all_reduce(gradients.to_reduce())

    def metrics(self) -> dict[str, Any]:
        """Return a line of metrics, and begin the next.

        Raises:
            ArithmeticError: loss and gradient are no longer finite; one step may fail, and is
                left out, but this is how a run ends that has diverged.
        """
        config = self.config
        masses = torch.tensor(self.strata.masses)
        row = {
            "step": self.step,
            "images_seen": self.step * config.batch_size,
            **self.window.means(masses, config.batch_size),
            "prior_strength": config.mixture.prior_at(self.step - 1, config.steps),
            "learning_rate": config.optimizer.learning_rate
            * config.optimizer.lr_factor(self.step - 1, config.steps),
            "reduced_bytes": self.reduced_bytes,
        }
        if not (math.isfinite(row["loss"]) or self.window.last_grad_norm.isfinite()):
            raise ArithmeticError(
                f"training diverged: the loss is {row['loss']} at step {self.step}; start again "
                "from an earlier checkpoint with a smaller learning_rate"
            )
        self.window = self._new_window()
        return row

    def sample(self) -> tuple[np.ndarray, list[str]]:
        """Draw a few images from the averaged weights: (n, H, W, C) uint8, and their classes."""
        output, names = self.config.output, self.model.config.class_names
        sampling = SamplingConfig(
            num_images=output.sample_images,
            num_inference_steps=output.sample_inference_steps,
            seed=self.config.seed,
        )
        autoencoder = load_autoencoder(self.model.config.autoencoder)
        with self.optimizer.averaged():
            batches = list(sample(self.model, autoencoder, sampling))
        self.model.network.train()
        labels = [int(label) for batch in batches for label in batch.class_labels]
        images = np.concatenate([batch.images for batch in batches])
        return images, [names[label] for label in labels] if names else []

    def _new_window(self) -> Window:
        return Window(self.strata.num_experts, self.device)


def train(config: TrainConfig, report: Report | None = None) -> Iterator[Progress]:
    """Train, step by step; every step is reported.

    The caller may stop asking at any time: the run goes on from its last checkpoint when the same
    configuration is trained again.

    Args:
        config: The run.
        report: Is told how far the data are encoded, where they have to be, before the first step.
    """
    ranks = distributed.start(distributed.pick_device(config.device))
    # Everything that can be refused is refused before the run's directory is made.
    check_batch_size(config.batch_size, ranks.num_ranks)
    check_steps(config)
    check_shard_size(config, ranks)
    model = starting_model(config, outline_of(config))
    settings = settings_of(config, model)
    # Encoded data are told by their digest; others, before the effort, by where they are.
    unknown = "data" if settings["data_digest"] else "data_digest"
    check_run(config.output_dir, settings, {*MAY_CHANGE, unknown})
    dataset = open_dataset(config, ranks, report)
    settings["data_digest"] = dataset.digest
    check_run(config.output_dir, settings, {*MAY_CHANGE, "data"})
    if ranks.is_first and (remark := stretched_schedules(config)):
        logger.warning(remark)
    training = Training(config, model, dataset, ranks)
    training.resume()  # first, as a checkpoint may be damaged
    distributed.barrier()  # nobody is still looking at what the directory holds
    if ranks.is_first:
        claim_run(config.output_dir, settings)
    distributed.barrier()
    recorder = recorder_of(config, training)
    for batch in training.loader.batches(training.step):
        if training.step >= config.steps:
            break
        plan = training.take_step(batch)
        metrics = None
        if is_due(training.step, config, config.output.log_every, config.output.save_every):
            metrics = training.metrics()
        if recorder is not None:
            recorder.record(metrics)
        yield Progress(training.step, config.steps, plan.strata, metrics)
    if recorder is not None:
        recorder.finish()
    distributed.barrier()


def check_steps(config: TrainConfig) -> None:
    """Refuse fewer steps than the run has done already."""
    newest = newest_checkpoint(config.output_dir)
    done = int(newest.name.removeprefix("step-")) if newest else 0
    if config.steps < done:
        raise ValueError(
            f"steps must be at least the {done} that the run has done, got {config.steps}"
        )


def check_shard_size(config: TrainConfig, ranks: Ranks) -> None:
    """Refuse groups that do not hold the same number of processes."""
    if config.shard_size and ranks.num_ranks > 1 and ranks.num_ranks % config.shard_size:
        raise ValueError(
            f"shard_size must divide the {ranks.num_ranks} processes, got {config.shard_size}"
        )


def recorder_of(config: TrainConfig, training: Training) -> "Recorder | Companion | None":
    """Return what this process does when something is to be written."""
    if training.ranks.is_first:
        return Recorder(config, training)
    return Companion(config, training) if config.shard else None


def is_due(step: int, config: TrainConfig, *every: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return step == config.steps or any(each and step % each == 0 for each in every)


def open_dataset(config: TrainConfig, ranks: Ranks, report: Report | None) -> ShardDataset:
    """Open the shards, or encode the pixels of a source into the run's directory once."""
    size = config.image_size or config.network.input_size
    encode = EncodeConfig(image_size=size, seed=config.seed, strict=config.strict)
    cache = config.output_dir / DATA_DIR
    if ranks.is_first:
        for progress in encoded(config, encode):
            if report is not None:
                report(progress)
    distributed.barrier()
    return finish(prepare(config.data, cache, encode))


def encoded(config: TrainConfig, encode: EncodeConfig) -> Iterator[Encoded]:
    """Encode the data where that has not been done, and tell of images that were left out."""
    dataset = yield from prepare(config.data, config.output_dir / DATA_DIR, encode)
    tell_of_skipped(config, dataset)


def tell_of_skipped(config: TrainConfig, dataset: ShardDataset) -> None:
    """Name an image that could not be read; refuse the data when strict."""
    skipped = dataset.index["skipped"]
    if not skipped:
        return
    text = (
        f"{len(skipped)} of {len(skipped) + len(dataset)} images of {config.data} are left out, "
        f"such as {skipped[0]['image']}: {skipped[0]['reason']}"
    )
    if config.strict:
        raise ValueError(f"data must hold no image that cannot be read when strict: {text}")
    logger.warning(text)


class Companion:
    """What the other processes do when the first one records, which needs all slices."""

    def __init__(self, config: TrainConfig, training: Training) -> None:
        self.config, self.training = config, training

    def record(self, metrics: dict[str, Any] | None) -> None:
        """Hand over what is due after a step."""
        output, training = self.config.output, self.training
        if output.sample_every and is_due(training.step, self.config, output.sample_every):
            training.sample()
        if is_due(training.step, self.config, output.save_every):
            checkpoint.hand_over(training.model, training.optimizer)

    def finish(self) -> None:
        """Hand over the finished model."""
        with self.training.optimizer.averaged():
            self.training.model.mixture.state_dict()


class Recorder:
    """What the first process writes: metrics, curves, samples, checkpoints, the model."""

    def __init__(self, config: TrainConfig, training: Training) -> None:
        self.config, self.training = config, training
        cut_metrics(config.output_dir, training.step)
        self.board: Board | None = None
        if config.output.tensorboard:
            self.board = Board(config.output_dir, training.step)

    def record(self, metrics: dict[str, Any] | None) -> None:
        """Write what is due after a step."""
        config, training = self.config, self.training
        if metrics is not None:
            self._write_metrics(metrics)
        if config.output.sample_every and is_due(training.step, config, config.output.sample_every):
            self._write_samples()
        if is_due(training.step, config, config.output.save_every):
            checkpoint.save(
                config.output_dir,
                training.step,
                training.model,
                training.optimizer,
                config.output.keep_checkpoints,
            )

    def finish(self) -> None:
        """Write the finished model."""
        with self.training.optimizer.averaged():
            self.training.model.save_pretrained(self.config.output_dir / "model")
        if self.board:
            self.board.close()

    def _write_metrics(self, metrics: dict[str, Any]) -> None:
        append_metrics(self.config.output_dir, metrics)
        if not self.board:
            return
        self.board.add_metrics(metrics)
        model, step = self.training.model, self.training.step
        if model.num_bases > 1:
            tables = model.mixture.coefficients().detach().cpu().numpy()
            tables = tables if model.config.per_block else tables[0]
            self.board.add_coefficients(tables, model.intervals.boundaries, step)

    def _write_samples(self) -> None:
        from remixdit.figures.grids import image_grid

        images, names = self.training.sample()
        grid = image_grid(images, 8, names)
        directory = self.config.output_dir / "samples"
        directory.mkdir(exist_ok=True)
        grid.save(directory / f"step-{self.training.step:08d}.png")
        if self.board:
            self.board.add_samples(np.array(grid), self.training.step)
