"""A run in progress: the model, its optimizer, its average and its data."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from remixdit import distributed
from remixdit.data import Batch, Loader, ShardDataset
from remixdit.data.autoencoder import Autoencoder, load_autoencoder
from remixdit.distributed import Ranks
from remixdit.distributed.parallel import replicate, shard
from remixdit.model.imagenet import shown_names
from remixdit.model.loading import newest_checkpoint
from remixdit.model.model import RemixDiT
from remixdit.sampling.sampler import SamplingConfig, sample
from remixdit.training import checkpoint
from remixdit.training.average import Average
from remixdit.training.config import PRECISIONS, TrainConfig
from remixdit.training.optimizer import (
    clip,
    gradients_of_logits,
    optimizer_of,
    set_learning_rates,
    step_if,
)
from remixdit.training.plan import Inputs, Planner
from remixdit.training.skipped import MAX_IN_A_ROW, Skipped, bad_positions, refusal
from remixdit.training.start import Start
from remixdit.training.step import Window, gradients
from remixdit.training.strata import training_strata

__all__ = ["Training"]

SAMPLED_AT_ONCE = 8  # the activations of an autoencoder are large


class Training:
    """A run in progress.

    Args:
        config: The run.
        start: Model to begin with.
        dataset: Training data.
        ranks: Rank of this process.
    """

    def __init__(
        self, config: TrainConfig, start: Start, dataset: ShardDataset, ranks: Ranks
    ) -> None:
        self.config, self.ranks = config, ranks
        self.device = distributed.pick_device(config.device)
        self.model = RemixDiT.empty(start.config)
        if config.train == "coefficients":  # before there are gradients, moments or averages
            for parameter in self.model.network.parameters():
                parameter.requires_grad_(parameter is self.model.experts.logits)
        self.network = self._wrapped(self.model.network)
        self.checksum = start.fill(self.model, self.device)
        if config.compile:
            compile_blocks(self.model.network)
        if ranks.num_ranks > 1 and not config.shard:
            self.network = replicate(self.model.network, self.device)
        precision = PRECISIONS[config.precision]
        self.optimizer = optimizer_of(self.model.experts, config.optimizer, precision)
        self.average = Average(self.model.network)
        self.strata = training_strata(self.model.config, config)
        only = config.objective.only_interval()
        self.planner = Planner(
            self.strata,
            config.strata_per_step,
            config.batch_size,
            config.seed,
            self.model.config.network.num_classes,
            config.objective.label_dropout,
            only[0] if only else None,
        )
        self.loader = Loader(
            dataset,
            config.batch_size,
            seed=config.seed,
            mirror=config.objective.mirror,
            rank=ranks.rank,
            num_ranks=ranks.num_ranks,
        )
        self.step = 0
        self.skipped = Skipped(self.device)
        self.window = self._new_window()

    def _wrapped(self, network: nn.Module) -> nn.Module:
        """Shard the network on request, before it has any storage."""
        self.model.network.recompute = self.config.recompute
        if self.is_sharded:
            bases = list(self.model.experts.bases().values())
            shard(network, list(self.model.network.blocks), bases, self.config.shard_size)
        return network

    @property
    def is_sharded(self) -> bool:
        """Whether every process holds only a part of the weights."""
        return self.config.shard and self.ranks.num_ranks > 1

    def batches(self) -> Iterator[Inputs]:
        """Yield the inputs of the remaining steps, made ahead in the loader's thread."""

        def make(step: int, batch: Batch) -> Inputs:
            inputs = self.planner.inputs(step, batch)
            return inputs.pinned() if self.device.type == "cuda" else inputs

        return self.loader.batches(self.step, make)

    def resume(self) -> None:
        """Resume from the newest checkpoint, if there is one."""
        newest = newest_checkpoint(self.config.output_dir)
        if newest is not None:
            state, self.checksum = checkpoint.restore(
                newest, self.model, self.optimizer, self.average
            )
            self.step, self.skipped = state.step, Skipped(self.device, state.skipped_steps)

    def take_step(self, inputs: Inputs) -> None:
        """Take one optimizer step."""
        config, experts = self.config, self.model.experts
        gradients(
            self.model,
            self.network,
            inputs,
            self.window,
            micro_batch_size=config.micro_batch_size,
            precision=PRECISIONS[config.precision],
        )
        weights = [p for p in self.model.network.parameters() if p is not experts.logits]
        norm = clip(weights, experts.logits, config.optimizer.max_grad_norm)
        prior = config.mixture.prior_at(self.step, config.steps)
        norms = torch.stack([norm, *gradients_of_logits(experts, prior)])
        good = norms.isfinite().all()
        self.last = inputs, self.window.end_step(norms, good)
        set_learning_rates(self.optimizer, config.optimizer.lr_factor(self.step, config.steps))
        step_if(good, self.optimizer)
        self.optimizer.zero_grad()
        self.average.update(config.optimizer.ema_weight(self.step), good)
        self.skipped.add(good)
        self.step += 1
        if good.device.type == "cpu":  # on a GPU, only a line of metrics waits for the device
            self._refuse_skipping()

    def _refuse_skipping(self) -> None:
        """Refuse to go on after too many skipped steps in a row."""
        in_a_row = self.skipped.in_a_row()
        if in_a_row >= MAX_IN_A_ROW:
            inputs, losses = self.last
            places = bad_positions(inputs, losses, self.config.batch_size)
            images = self.loader.indices(inputs.plan.step, np.array(places, np.int64))
            raise refusal(self.step, in_a_row, inputs.plan.strata, images.tolist())

    def metrics(self) -> dict[str, Any]:
        """Return a line of metrics, means over the steps that were not skipped; begin the next."""
        self._refuse_skipping()
        config = self.config
        masses = torch.tensor(self.strata.masses)
        row = {
            "step": self.step,
            "images_seen": self.step * config.batch_size,
            **self.window.means(masses, config.batch_size),
            "prior_strength": config.mixture.prior_at(self.step - 1, config.steps),
            "learning_rate": config.optimizer.learning_rate
            * config.optimizer.lr_factor(self.step - 1, config.steps),
            "reduced_bytes": self.reduced_bytes(),
            "skipped_steps": self.skipped.total(),
        }
        self.window = self._new_window()
        return row

    def loss_so_far(self) -> float | None:
        """Return the mean loss since the last line of metrics, None where that waits for a GPU."""
        if self.device.type != "cpu":
            return None
        return self.window.loss_so_far(torch.tensor(self.strata.masses))

    def reduced_bytes(self) -> int:
        """Return the bytes of gradients that a process hands over in a backward pass."""
        if self.ranks.num_ranks == 1:
            return 0
        trained = (p for p in self.model.network.parameters() if p.requires_grad)
        return sum(parameter.numel() * parameter.itemsize for parameter in trained)

    def autoencoder(self, offline: bool) -> Autoencoder:
        """Load what makes pixels of samples; offline only if it is on this machine."""
        if not self.model.config.draws_images:
            raise ValueError("the data do not say which autoencoder made their latents")
        return load_autoencoder(self.model.config.autoencoder, self.device, offline)

    def sample(self, autoencoder: Autoencoder) -> tuple[np.ndarray, list[str], str]:
        """Draw a few images from the averaged weights.

        Returns:
            (n, H, W, C) uint8, the name of the class of each, and the settings of the sampler.
        """
        from remixdit.figures.fonts import class_texts  # matplotlib takes a while

        started = time.perf_counter()
        output, names = self.config.output, shown_names(self.model.config)
        sampling = SamplingConfig(
            num_images=output.sample_images,
            num_inference_steps=output.sample_inference_steps,
            batch_size=SAMPLED_AT_ONCE,
            seed=self.config.seed,
        )
        with self.average.swapped_in():
            batches = list(sample(self.model, autoencoder, sampling))
        labels = [int(label) for batch in batches for label in batch.class_labels]
        images = np.concatenate([batch.images for batch in batches])
        self.window.started += time.perf_counter() - started  # images/s are those of training
        return images, class_texts(labels, names), sampling.summary(self.model)

    def _new_window(self) -> Window:
        return Window(self.strata.num_experts, self.device)


def compile_blocks(network: nn.Module) -> None:
    """Compile a network block by block: one graph serves all blocks, at any M."""
    # With a coefficient table for each block every block has a graph of its own.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 4 * len(network.blocks))  # type: ignore[arg-type]
    for block in network.blocks:  # type: ignore[union-attr]
        block.compile(fullgraph=True)
