"""The interval, timestep, noise and label of each image: a function of (seed, step, image).

Image i of the batch of all processes belongs to group i mod M, so that every process holds some
images of every expert. A process draws for its own images only, so its work
does not grow with the batch of all processes.

Shapes: B = batch_size over all processes, b images of one process, M experts of a step, C H W
latents.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from remixdit.data import Batch
from remixdit.diffusion.intervals import Intervals
from remixdit.seeds import generator_for, hashed

__all__ = ["Inputs", "Planner", "StepPlan"]

TIMESTEPS, LABELS, NOISE = 11, 12, 13  # keep the draws of one image of one step apart


class StepPlan(NamedTuple):
    """The intervals that a step trains, the same for all processes."""

    step: int
    """Number of the step, in [0, steps)."""
    strata: tuple[int, ...]
    """(M,) intervals of this step; image i belongs to strata[i mod M]."""
    weights: tuple[float, ...]
    """(M,) weight of each image of a group in the loss; over all images the sum is about 1."""


class Inputs(NamedTuple):
    """One process's share of a step, its images sorted by group."""

    plan: StepPlan
    latents: Tensor
    """(b, C, H, W) clean latents."""
    noise: Tensor
    """(b, C, H, W) noise."""
    timesteps: Tensor
    """(b,) timesteps: int64 in [0, T), or float32 in [0, 1]."""
    class_labels: Tensor
    """(b,) int64 labels, of which some are the null label."""
    weights: Tensor
    """(b,) weight of each image in the loss."""
    strata: Tensor
    """(b,) interval of each timestep, on the CPU."""
    positions: Tensor
    """(b,) place of each image in the batch of all processes, on the CPU."""

    def rows(self, start: int, stop: int) -> "Inputs":
        """Return the images in [start, stop)."""
        return Inputs(self.plan, *(values[start:stop] for values in self[1:]))

    def pinned(self) -> "Inputs":
        """Return the inputs in pinned memory, from which copies to a GPU overlap with its work."""
        return Inputs(self.plan, *(values.pin_memory() for values in self[1:]))

    def to(self, device: torch.device) -> "Inputs":
        """Return the inputs on a device, but for strata and positions, needed on the CPU."""
        moved = {
            name: values.to(device, non_blocking=True)
            for name, values in self._asdict().items()
            if name not in ("plan", "strata", "positions")
        }
        return self._replace(**moved)


@dataclass(frozen=True)
class Planner:
    """Draws all random parts of a step.

    Args:
        intervals: Intervals of the experts, or strata of a plain network.
        count: Number of intervals over which every batch is spread, M.
        batch_size: Images over all processes, B; at least M.
        seed: Seed of the run.
        num_classes: The null label.
        label_dropout: Share of the labels that become the null label.
    """

    intervals: Intervals
    count: int
    batch_size: int
    seed: int
    num_classes: int
    label_dropout: float
    only: int | None = None
    """The one interval of all images, with M = 1; None for all intervals."""

    def plan(self, step: int) -> StepPlan:
        """Draw the intervals of a step."""
        if self.only is not None:
            return StepPlan(step, (self.only,), (1 / self.batch_size,))
        draw = self.intervals.draw_experts(self.count, self.seed, step)
        weights = (
            weight / size for weight, size in zip(draw.weights, self.group_sizes(), strict=True)
        )
        return StepPlan(step, draw.experts, tuple(weights))

    def group_sizes(self) -> list[int]:
        """Return (M,) the number of images of each group, over all processes."""
        each, more = divmod(self.batch_size, self.count)
        return [each + (group < more) for group in range(self.count)]

    def inputs(self, step: int, batch: Batch) -> Inputs:
        """Draw all that a step needs beside the images, for the images of this process."""
        plan = self.plan(step)
        groups = batch.positions % self.count
        order = groups.argsort(stable=True)
        groups, positions = groups[order], batch.positions[order]
        strata = torch.tensor(plan.strata)[groups]
        timesteps = self.intervals.timesteps_at(strata, self.uniform(TIMESTEPS, step, positions))
        dropped = self.uniform(LABELS, step, positions) < self.label_dropout
        latents = batch.latents[order]
        return Inputs(
            plan,
            latents,
            self.noise(step, positions, latents.shape[1:]),
            timesteps,
            torch.where(dropped, self.num_classes, batch.class_labels[order]),
            torch.tensor(plan.weights)[groups],
            strata,
            positions,
        )

    def uniform(self, stream: int, step: int, positions: Tensor) -> Tensor:
        """Return (b,) float64 in [0, 1), one for each image."""
        bits = hashed(self.seed, stream, step, positions.numpy())
        return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def noise(self, step: int, positions: Tensor, shape: torch.Size) -> Tensor:
        """Return (b, C, H, W) normal noise, each image's from a generator of its own."""
        noise = torch.empty(len(positions), *shape)
        generator = generator_for(self.seed, "noise", step)
        seeds = hashed(self.seed, NOISE, step, positions.numpy()) >> np.uint64(1)
        for image, seed in zip(noise, seeds.tolist(), strict=True):
            image.normal_(generator=generator.manual_seed(seed))
        return noise
