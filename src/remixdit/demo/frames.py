"""What the page shows: images of one or two models while they denoise, and who draws them.

A request is a `SamplingConfig` within bounds, since anybody who reaches the page can make one. The
models take their steps together, from the same noise.

Shapes: B images, H W C of one.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from remixdit.data.autoencoder import Autoencoder
from remixdit.model.match import match, side_of
from remixdit.model.model import RemixDiT
from remixdit.sampling.moments import moments
from remixdit.sampling.sampler import SamplingConfig

__all__ = ["Frame", "check_against", "check_bounds", "fixed_expert", "frames"]

BOUNDS = {"num_images": 16, "num_inference_steps": 250, "guidance_scale": 20, "seed": 2**32 - 1}
MAX_FRAMES = 32  # each decodes all images and sends them to the browser


class Frame(NamedTuple):
    """Images after some of the steps."""

    step: int
    """Number of steps done, in [1, S]."""
    timestep: float
    """Timestep of the last of them."""
    expert: int
    """Expert of the first model that took it."""
    images: tuple[NDArray[np.uint8], ...]
    """(B, H, W, C) of each model."""


def frames(
    models: Sequence[RemixDiT], autoencoder: Autoencoder, config: SamplingConfig
) -> Iterator[Frame]:
    """Draw the requested images with each model; at most 32 frames, the last of finished images."""
    check_bounds(config)
    runs = [moments(model, autoencoder, config, MAX_FRAMES) for model in models]
    for first, *others in zip(*runs, strict=True):
        images = tuple(moment.images for moment in (first, *others))
        yield Frame(first.step, first.timestep, first.expert, images)


def check_bounds(config: SamplingConfig) -> None:
    """Refuse a request that would keep the machine from others."""
    for name, bound in BOUNDS.items():
        if getattr(config, name) > bound:
            raise ValueError(f"{name} must be at most {bound}, got {getattr(config, name)}")
    if config.seed < 0:
        raise ValueError(f"seed must be at least 0, got {config.seed}")


def fixed_expert(model: RemixDiT, expert: int) -> RemixDiT:
    """Return a model in which one expert owns all timesteps."""
    if not 0 <= expert < model.num_experts:
        raise ValueError(f"expert must be in [0, {model.num_experts}), got {expert}")
    config = model.config
    fixed = RemixDiT.from_experts(
        [model.expert(expert)],
        prediction_type=config.prediction_type,
        num_train_timesteps=config.num_train_timesteps,
        class_names=config.class_names,
        autoencoder=config.autoencoder,
    )
    fixed = fixed.to(model.device).eval()
    fixed.sample_with(*model.sampling)  # in the same precision
    return fixed


def check_against(model: RemixDiT, against: RemixDiT, name: str) -> None:
    """Refuse a model that would draw something else from the same noise and labels."""
    theirs = match(
        side_of("the checkpoint", model.config), side_of(f"--against {name}", against.config)
    )
    if theirs != tuple(range(len(theirs))):
        raise ValueError(f"--against {name} must have the classes of the checkpoint in their order")
