"""Strips: the first few images as they come about, and the expert that draws each of them."""

from dataclasses import replace

import numpy as np
from PIL import Image

from remixdit.data.autoencoder import Autoencoder
from remixdit.model.imagenet import shown_names
from remixdit.model.model import RemixDiT
from remixdit.sampling.moments import moments
from remixdit.sampling.sampler import SamplingConfig, labels_of

__all__ = ["draw_strips"]

ROWS, MOMENTS = 4, 8


def draw_strips(
    model: RemixDiT, autoencoder: Autoencoder, config: SamplingConfig, name: str
) -> Image.Image:
    """Draw the first 4 images of a configuration, each at 8 moments of its trajectory.

    Shown is the clean image that the network predicts: the noisy one shows nothing of the first
    half of the steps. The last is the finished image, as `sample` draws it.

    Args:
        model: Model whose experts draw.
        autoencoder: Decoder of its latents.
        config: Images to draw.
        name: Name of the model, for the title.
    """
    from remixdit.figures.fonts import class_texts
    from remixdit.figures.strips import denoising_strips  # matplotlib takes a while

    few = replace(config, num_images=min(config.num_images, ROWS))
    seen = list(moments(model, autoencoder, few, MOMENTS, predicted=True))
    first = f"{name}: the image that each expert predicts, from noise to the finished image"
    return denoising_strips(
        np.stack([moment.images for moment in seen], axis=1),  # (R, F, H, W, C)
        [moment.timestep for moment in seen],
        [moment.expert for moment in seen],
        model.num_experts,
        row_labels=class_texts(labels_of(model, few).tolist(), shown_names(model.config)),
        title=f"{first}\n{config.summary(model)}",
    )
