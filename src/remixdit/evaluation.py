"""Validation losses: every expert on every interval, with noise paired across models.

The cheap and low-noise measure of progress: the same images, timesteps and noise for every model
and every expert, so that differences are differences of the weights. The mean over the intervals,
each by its own expert, is the number that training drives down.

Shapes: n images, N experts, I intervals, C H W latents.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from remixdit.data import ShardDataset
from remixdit.intervals import Intervals
from remixdit.model import RemixDiT
from remixdit.seeds import generator_for

__all__ = ["Held", "held_out", "interval_losses", "loss_matrix"]


class Held(NamedTuple):
    """Images to measure on."""

    latents: Tensor
    """(n, C, H, W) float32."""
    class_labels: Tensor
    """(n,) int64."""


def held_out(dataset: ShardDataset, num_images: int, seed: int = 0) -> Held:
    """Return the first images of a data set, each posterior drawn once from (seed, image)."""
    if not 1 <= num_images <= len(dataset):
        raise ValueError(f"num_images must be in 1..{len(dataset)}, got {num_images}")
    indices = np.arange(num_images)
    return Held(*dataset.read(indices, np.zeros_like(indices), seed))


def interval_losses(
    model: RemixDiT,
    held: Held,
    intervals: Intervals,
    *,
    experts: Iterable[int] | None = None,
    seed: int = 0,
    batch_size: int = 128,
) -> np.ndarray:
    """Measure experts on intervals.

    Args:
        model: Its weights, as they are.
        held: n images.
        intervals: I of them; the model's own, or others for a plain DiT.
        experts: The experts to measure on every interval; by default each interval is measured
            with its owner alone.
        seed: Of the timesteps and the noise; the same for two models pairs them.
        batch_size: Images at a time; does not change the result.

    Returns:
        (E, I, n) float64 mean squared errors of the prediction, E = 1 by default.
    """
    owners = [None] if experts is None else list(experts)
    losses = np.empty((len(owners), intervals.num_experts, len(held.latents)))
    for interval in range(intervals.num_experts):
        generator = generator_for(seed, "validation", interval)
        timesteps = intervals.draw_timesteps(interval, len(held.latents), generator)
        noise = torch.randn(held.latents.shape, generator=generator)
        for row, owner in enumerate(owners):
            expert = owner if owner is not None else owner_of(model, intervals, interval)
            losses[row, interval] = expert_losses(model, expert, held, timesteps, noise, batch_size)
    return losses


def owner_of(model: RemixDiT, intervals: Intervals, interval: int) -> int:
    """Return the expert that owns an interval, by its first timestep."""
    start = torch.tensor([intervals.boundaries[interval]], dtype=torch.float64)
    return int(model.intervals.expert_at(start))


@torch.no_grad()
def expert_losses(
    model: RemixDiT,
    expert: int,
    held: Held,
    timesteps: Tensor,
    noise: Tensor,
    batch_size: int,
) -> np.ndarray:
    """Return the (n,) mean squared errors of one expert at the given timesteps and noise."""
    parts = []
    for rows in torch.split(torch.arange(len(held.latents)), batch_size):
        latents, drawn, labels, times = (
            values[rows].to(model.device)
            for values in (held.latents, noise, held.class_labels, timesteps)
        )
        noisy = model.process.add_noise(latents, drawn, times)
        output = model.predict(expert, noisy, times, labels)
        parts.append(model.process.loss(output, latents, drawn, times).mse.double().cpu())
    return torch.cat(parts).numpy()


def loss_matrix(model: RemixDiT, held: Held, *, seed: int = 0) -> np.ndarray:
    """Return the (N, N) mean loss of every expert on every interval (figure 4c of 2412.05628)."""
    experts = range(model.num_experts)
    return interval_losses(model, held, model.intervals, experts=experts, seed=seed).mean(-1)
