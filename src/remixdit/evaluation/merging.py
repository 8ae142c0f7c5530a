"""The convex combination of experts whose one network has the lowest loss on held-out images.

Weights start as the shares of the timesteps and follow the gradient of the loss (exponentiated, so
that they stay positive and sum to 1). A candidate is kept if its measured loss is lower, so the
result is never worse than the mean on the images that were searched; the others tell how much of
the gain is real.

Shapes: n images, N experts, K bases, L coefficient tables.
"""

import copy
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from remixdit.diffusion.intervals import Intervals
from remixdit.evaluation.experts import compared
from remixdit.evaluation.held_out import HeldOut
from remixdit.evaluation.losses import drawn_points, interval_losses
from remixdit.model.merging import merged, mixed_rows, shares
from remixdit.model.model import RemixDiT
from remixdit.progress import Progress
from remixdit.seeds import generator_for

__all__ = ["Candidate", "MergeConfig", "halves", "measured_losses", "search"]

SMALLEST_STEP = 1e-3


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How a combination of experts is searched."""

    num_candidates: int = 20
    """Number of combinations that are measured, the mean among them."""
    seed: int = 0
    """Seed for timesteps and noise, and for the choice of images."""
    batch_size: int = 64
    """Number of images in one forward pass. It does not change the result."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("num_candidates", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Candidate(NamedTuple):
    """A combination of the experts."""

    weights: Tensor
    """Weights of the experts, (N,) float64, of sum 1."""
    loss: float
    """Loss on the images that are searched, over all timesteps."""


def halves(held: HeldOut) -> tuple[HeldOut, HeldOut]:
    """Return every other image, to search on, and the rest, to measure on."""
    if len(held.latents) < 4:
        raise ValueError(f"num_images must be at least 4 to search, got {len(held.latents)}")
    first, second = (HeldOut(*(values[start::2] for values in held)) for start in (0, 1))
    return first, second


def search(
    model: RemixDiT, held: HeldOut, config: MergeConfig
) -> Generator[Progress, None, list[Candidate]]:
    """Search the combination of lowest loss.

    Args:
        model: Mixture of at least 2 experts, on its device.
        held: Images to search on.
        config: How to search.

    Returns:
        Everything that was measured, the mean first; the one of lowest loss is the result.
    """
    trial = Trial(model, held, config)
    best = Candidate(shares(model), trial.loss(shares(model)))
    found, step, slope = [best], 1.0, trial.slope(best.weights)
    while len(found) < config.num_candidates and step >= SMALLEST_STEP and slope.any():
        yield Progress("candidates", len(found), config.num_candidates, f"loss {best.loss:.5f}")
        weights = best.weights * torch.exp(-step * slope)
        weights = weights / weights.sum()
        found.append(Candidate(weights, trial.loss(weights)))
        if found[-1].loss < best.loss:
            best = found[-1]
            slope = trial.slope(best.weights)
        else:
            step /= 2
    yield Progress("candidates", config.num_candidates, config.num_candidates)
    return found


class Trial:
    """A copy of a mixture all of whose experts are one combination.

    Args:
        model: Mixture.
        held: Images to measure on.
        config: Seed and batch size.
    """

    def __init__(self, model: RemixDiT, held: HeldOut, config: MergeConfig) -> None:
        self.tables = model.experts.coefficients().detach()  # (L, N, K)
        self.model, self.held, self.config = copy.deepcopy(model), held, config
        self.model.network.requires_grad_(False)
        experts = self.model.experts
        experts.kind = "raw"
        experts.logits = nn.Parameter(torch.zeros_like(experts.logits))

    def loss(self, weights: Tensor) -> float:
        """Return the measured loss over all timesteps."""
        self._write(weights)
        losses = mean_losses(self.model, self.held, self.model.intervals, self.config)
        return float(losses.mean())

    def slope(self, weights: Tensor) -> Tensor:
        """Return the gradient of the loss by the weights, less its mean, of largest size 1."""
        logits = self._write(weights)
        logits.grad = None
        intervals = self.model.intervals
        for interval, share in enumerate(intervals.masses):
            self._backward(interval, share / len(self.held.latents))
        assert logits.grad is not None
        grads = logits.grad.view(-1, *logits.shape[-2:]).sum(1)  # (L, K)
        found = torch.einsum("lnk,lk->n", self.tables.double(), grads.double()).cpu()
        found -= (weights * found).sum()
        largest = found.abs().max()
        return found / largest if largest > 0 else torch.zeros_like(found)

    def _backward(self, interval: int, share: float) -> None:
        generator = generator_for(self.config.seed, "validation", interval)
        points = drawn_points(self.held, self.model.intervals, interval, generator)
        process, device = self.model.process, self.model.device
        for rows in torch.split(torch.arange(len(self.held.latents)), self.config.batch_size):
            latents, labels = (values[rows].to(device) for values in self.held)
            timesteps, noise = (values[rows].to(device) for values in points)
            noisy = process.add_noise(latents, noise, timesteps)
            output = self.model(noisy, timesteps, labels)
            total = share * process.loss(output, latents, noise, timesteps).mse.sum()
            torch.autograd.backward(total)

    @torch.no_grad()
    def _write(self, weights: Tensor) -> nn.Parameter:
        """Give all experts the coefficients of one combination."""
        logits = self.model.experts.logits
        rows = mixed_rows(self.tables, weights.to(self.tables.device))  # (L, K)
        logits.copy_(rows[:, None].expand_as(self.tables).reshape(logits.shape))
        return logits


def measured_losses(
    model: RemixDiT, held: HeldOut, weights: Tensor, config: MergeConfig
) -> dict[str, Any]:
    """Return the loss of a merged network beside the mixture's, as JSON values.

    Args:
        model: Mixture.
        held: Images to measure on.
        weights: (N,) weights of its experts.
        config: Seed and batch size.
    """
    ours = mean_losses(merged(model, weights), held, model.intervals, config)
    return compared(ours, mean_losses(model, held, model.intervals, config))


def mean_losses(
    model: RemixDiT, held: HeldOut, intervals: Intervals, config: MergeConfig
) -> np.ndarray:
    """Return the loss of each image (n,), over the intervals by their shares."""
    losses = interval_losses(
        model, held, intervals, seed=config.seed, batch_size=config.batch_size
    )[0]
    found: np.ndarray = np.array(intervals.masses) @ losses
    if not np.isfinite(found).all():
        raise ArithmeticError("losses must be finite, got nan or inf: the model has diverged")
    return found
