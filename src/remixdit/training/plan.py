"""What a step does with each image, a pure function of (seed, step, image).

Image i of the batch of all processes belongs to group i mod M, so that every process holds some
images of every expert. A process draws for its own images only: none works in proportion to the
batch of all.

Shapes: B = batch_size over all processes, b images of this one, M experts of a step, C H W latents.
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
    """Which intervals a step trains, the same for all processes."""

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
    """(b, C, H, W) clean."""
    noise: Tensor
    """(b, C, H, W)."""
    timesteps: Tensor
    """(b,) int64 in [0, T), or float32 in [0, 1]."""
    class_labels: Tensor
    """(b,) int64, some dropped."""
    weights: Tensor
    """(b,) in the loss."""
    strata: Tensor
    """(b,) the interval of each timestep."""

    def rows(self, start: int, stop: int) -> "Inputs":
        """Return some of the images, neighbours."""
        return Inputs(self.plan, *(values[start:stop] for values in self[1:]))

    def pinned(self) -> "Inputs":
        """Return the inputs in pinned memory, from which copies to a GPU run beside its work."""
        return Inputs(self.plan, *(values.pin_memory() for values in self[1:]))

    def to(self, device: torch.device) -> "Inputs":
        """Bring all but the strata, which routing wants on the CPU, to a device."""
        moved = {
            name: values.to(device, non_blocking=True)
            for name, values in self._asdict().items()
            if name not in ("plan", "strata")
        }
        return self._replace(**moved)


@dataclass(frozen=True)
class Planner:
    """Draws whatever is random in a step.

    Args:
        intervals: Those of the experts, or the strata of a plain network.
        count: M, how many of them every batch is spread over.
        batch_size: B, at least M.
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
    """The one interval of all images, which then is M = 1."""

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
        """Draw what a step needs beside the images, for the images of this process."""
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
