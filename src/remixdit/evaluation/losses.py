"""Validation losses: every expert on every interval, with noise paired across models.

The cheap and low-noise measure of progress: the same images, timesteps and noise for every model
and every expert, so that differences are differences of the weights. The mean over the intervals,
each by its own expert and its share of the timesteps, is the number that training drives down.

Shapes: n images, N experts, I intervals, C H W latents.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from remixdit.diffusion.intervals import Intervals
from remixdit.evaluation.held_out import HeldOut
from remixdit.model.model import RemixDiT
from remixdit.seeds import generator_for

__all__ = ["interval_losses", "loss_matrix", "losses_on"]


def interval_losses(
    model: RemixDiT,
    held: HeldOut,
    intervals: Intervals,
    *,
    experts: Iterable[int] | None = None,
    seed: int = 0,
    batch_size: int = 128,
) -> np.ndarray:
    """Measure experts on intervals.

    Args:
        model: Its weights, as they are.
        held: Held-out images, n of them.
        intervals: I of them; the model's own, or others for a plain DiT.
        experts: The experts to measure on every interval; by default each image is measured
            with the owner of its timestep alone.
        seed: Seed for timesteps and noise; the same seed pairs two models.
        batch_size: Number of images in one forward pass; does not change the result.

    Returns:
        (E, I, n) float64 mean squared errors of the prediction, E = 1 by default.
    """
    chosen = None if experts is None else list(experts)
    parts = [
        losses_on(model, held, intervals, interval, chosen, seed, batch_size)
        for interval in range(intervals.num_experts)
    ]
    return np.stack(parts, axis=1)


def losses_on(
    model: RemixDiT,
    held: HeldOut,
    intervals: Intervals,
    interval: int,
    experts: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 128,
) -> np.ndarray:
    """Measure experts on one interval: (E, n), as `interval_losses` does on all of them."""
    points = drawn_points(held, intervals, interval, generator_for(seed, "validation", interval))
    if experts is None:
        return measure_owners(model, held, points, squared_error, batch_size)[None]
    return np.stack(
        [measure(model, expert, held, points, squared_error, batch_size) for expert in experts]
    )


class Points(NamedTuple):
    """Timestep and noise at which each image is measured."""

    timesteps: Tensor
    """Timesteps, (n,)."""
    noise: Tensor
    """Noise, (n, C, H, W)."""

    def rows(self, rows: Tensor) -> "Points":
        """Return those of some images."""
        return Points(self.timesteps[rows], self.noise[rows])


def drawn_points(
    held: HeldOut, intervals: Intervals, interval: int, generator: torch.Generator
) -> Points:
    """Draw a timestep inside an interval, and noise, for each image."""
    timesteps = intervals.draw_timesteps(interval, len(held.latents), generator)
    return Points(timesteps, torch.randn(held.latents.shape, generator=generator))


# (model, output, clean latents, points) -> (B,), one number an image
Measure = Callable[[RemixDiT, Tensor, Tensor, Points], Tensor]


def squared_error(model: RemixDiT, output: Tensor, latents: Tensor, points: Points) -> Tensor:
    """Return the mean squared error of the prediction."""
    return model.process.loss(output, latents, points.noise, points.timesteps).mse


def measure_owners(
    model: RemixDiT, held: HeldOut, points: Points, what: Measure, batch_size: int
) -> np.ndarray:
    """Measure each image with the expert that owns its timestep: (n,)."""
    experts = model.intervals.expert_at(points.timesteps)
    found = np.empty(len(held.latents))
    for expert in torch.unique(experts).tolist():
        rows = (experts == expert).nonzero()[:, 0]
        own = HeldOut(held.latents[rows], held.class_labels[rows])
        found[rows.numpy()] = measure(model, expert, own, points.rows(rows), what, batch_size)
    return found


@torch.no_grad()
def measure(
    model: RemixDiT, expert: int, held: HeldOut, points: Points, what: Measure, batch_size: int
) -> np.ndarray:
    """Measure one expert at the given timesteps and noise: (n,)."""
    parts = []
    for rows in torch.split(torch.arange(len(held.latents)), batch_size):
        latents, labels = (values[rows].to(model.device) for values in held)
        part = Points(*(values[rows].to(model.device) for values in points))
        noisy = model.process.add_noise(latents, part.noise, part.timesteps)
        output = model.predict(expert, noisy, part.timesteps, labels)
        parts.append(what(model, output, latents, part).double().cpu())
    return torch.cat(parts).numpy()


def loss_matrix(model: RemixDiT, held: HeldOut, *, seed: int = 0) -> np.ndarray:
    """Return the (N, N) mean loss of every expert on every interval.

    It is figure 4c of arXiv:2412.05628.
    """
    experts = range(model.num_experts)
    return interval_losses(model, held, model.intervals, experts=experts, seed=seed).mean(-1)
