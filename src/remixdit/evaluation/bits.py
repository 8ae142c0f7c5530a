"""The variational bound: how many bits a dimension a model needs for held-out images.

    bits = sum over t of L[t] + L[T]        L[t] of `Diffusion.bound_term`, L[T] of `prior_term`

Nearly all of the sum lies in the first few timesteps, so it is estimated in strata that double
in width, cut again where experts change. Each image draws one timestep a stratum:

    sum over strata of width * L[drawn timestep]        has no bias, whatever the strata are

Shapes: n images, S strata.
"""

import numpy as np
import torch
from torch import Tensor

from remixdit.diffusion.intervals import Intervals
from remixdit.diffusion.noise import Diffusion
from remixdit.evaluation.held_out import HeldOut
from remixdit.evaluation.left_out import LeftOut
from remixdit.evaluation.losses import Points, drawn_points, measure_owners
from remixdit.model.model import RemixDiT
from remixdit.seeds import generator_for

__all__ = ["bound_strata", "prior_bits", "require_bound", "stratum_bits", "variational_bound"]


def require_bound(model: RemixDiT) -> None:
    """Leave the bound out for a model that has none."""
    if not isinstance(model.process, Diffusion):
        raise LeftOut(f"{model.config.prediction_type} has no variational bound of this kind")
    if model.config.autoencoder["name"] != "none":
        raise LeftOut("latents of an autoencoder have no levels to count bits for")


def variational_bound(
    model: RemixDiT, held: HeldOut, *, seed: int = 0, batch_size: int = 128
) -> np.ndarray:
    """Return (n,) an estimate of the bits a dimension of each image, without bias.

    Args:
        model: In pixels, of a discrete process; a fixed variance is the forward process's own.
        held: n images, pixels in [-1, 1] of 256 levels.
        seed: Seed for timesteps and noise; the same seed pairs two models where they have the
            same strata.
        batch_size: Number of images in one forward pass; does not change the result.

    Raises:
        LeftOut: The model has no bound.
    """
    require_bound(model)
    strata = bound_strata(model.intervals)
    parts = [
        stratum_bits(model, held, strata, stratum, seed, batch_size)
        for stratum in range(strata.num_experts)
    ]
    return np.sum(parts, axis=0) + prior_bits(model, held)


def bound_strata(*intervals: Intervals) -> Intervals:
    """Return strata that double in width from 1, cut again at the boundaries of intervals."""
    last = intervals[0].boundaries[-1]
    cuts = {int(boundary) for one in intervals for boundary in one.boundaries}
    cuts |= {2**power for power in range(int(last).bit_length()) if 2**power < last}
    return Intervals(tuple(sorted(cuts)))


def stratum_bits(
    model: RemixDiT,
    held: HeldOut,
    strata: Intervals,
    stratum: int,
    seed: int = 0,
    batch_size: int = 128,
) -> np.ndarray:
    """Return (n,) an estimate of the sum of one stratum's terms, for each image."""
    # By its place, not its number: other strata elsewhere leave the draw as it is.
    start, stop = strata.boundaries[stratum : stratum + 2]
    generator = generator_for(seed, "bound", int(start), int(stop))
    points = drawn_points(held, strata, stratum, generator)
    return (stop - start) * measure_owners(model, held, points, bound_term, batch_size)


def bound_term(model: RemixDiT, output: Tensor, latents: Tensor, points: Points) -> Tensor:
    """Return (B,) the bound's term at each image's timestep."""
    assert isinstance(model.process, Diffusion)
    noisy = model.process.add_noise(latents, points.noise, points.timesteps)
    return model.process.bound_term(output.float(), latents, noisy, points.timesteps)


@torch.no_grad()
def prior_bits(model: RemixDiT, held: HeldOut) -> np.ndarray:
    """Return (n,) the bits that the last noisy image still holds; the model has no part in it."""
    assert isinstance(model.process, Diffusion)
    return model.process.prior_term(held.latents).double().numpy()
