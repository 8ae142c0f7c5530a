"""Images at a few moments of their trajectories, for the page and for strips.

Shapes: B images, H W C of one; S steps of a trajectory.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from remixdit.data.autoencoder import Autoencoder
from remixdit.model.model import RemixDiT
from remixdit.sampling.sampler import SamplingConfig, denoising_steps

__all__ = ["Moment", "moments", "spread"]


class Moment(NamedTuple):
    """Images after some of the steps."""

    step: int
    """Number of steps done, in [1, S]."""
    timestep: float
    """Timestep of the last of them."""
    expert: int
    """Expert that took it."""
    images: NDArray[np.uint8]
    """(B, H, W, C)."""


def moments(
    model: RemixDiT,
    autoencoder: Autoencoder,
    config: SamplingConfig,
    count: int,
    *,
    predicted: bool = False,
) -> Iterator[Moment]:
    """Draw the images in one batch; yield at most `count` moments, the last of finished images.

    Args:
        model: Model that draws.
        autoencoder: Decoder of its latents.
        config: Images to draw.
        count: Number of moments, evenly spaced over the steps.
        predicted: Show the clean image that the network predicts, instead of the noisy one.
    """
    chosen = set(spread(config.num_inference_steps, count))
    steps = denoising_steps(model, config, range(config.num_images))
    for done, step in enumerate(steps, 1):
        if done in chosen:
            latents = step.pred_latents if predicted else step.latents
            images = autoencoder.decode(latents).cpu().numpy()
            yield Moment(done, step.timestep, step.expert, images)


def spread(total: int, count: int) -> list[int]:
    """Return at most `count` numbers of 1..total, evenly spaced; the first is 1, the last total."""
    if count == 1:
        return [total]
    places = np.linspace(1, total, min(count, total))
    return [int(place) for place in places.round()]
