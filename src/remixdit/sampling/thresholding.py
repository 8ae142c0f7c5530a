"""Thresholding: the clean image that a network predicts, kept within the range of pixels.

    static:  clipped = clip(image, -1, 1)                           (arXiv:2006.11239)
    dynamic: clipped = clip(image, -s, s) / s,                      (arXiv:2205.11487, section 2.3)
             s = max(1, 99.5th percentile of |image|), one for each image

Division by the signal multiplies an error of epsilon by 157 at the noisiest of 1000 timesteps. A
scheduler is given the prediction that implies the clipped image, so DDIM recomputes epsilon from
it, as ADM does (arXiv:2105.05233), and every sampler treats it alike.

Shapes: B batch, C H W pixels in [-1, 1].
"""

import torch
from torch import Tensor

from remixdit.diffusion.noise import Diffusion, Flow

__all__ = ["THRESHOLDINGS", "clipped", "thresholded"]

THRESHOLDINGS = ("none", "static", "dynamic")
PERCENTILE = 0.995  # of Imagen's dynamic thresholding


def thresholded(
    kind: str, process: Diffusion | Flow, prediction: Tensor, noisy: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the prediction that implies the clipped image, and that image.

    Args:
        kind: none, static or dynamic.
        process: Noise process of the model.
        prediction: (B, C, H, W) prediction of the network, without variance channels.
        noisy: (B, C, H, W) noisy pixels.
        timesteps: (B,).

    Returns:
        The prediction and the clean image, both (B, C, H, W). Pixels that are not moved keep the
        prediction of the network, bit for bit.
    """
    image = process.pred_latents(prediction, noisy, timesteps)
    if kind == "none":
        return prediction, image
    inside = clipped(image, kind)
    implied = process.target(inside, process.pred_noise(inside, noisy, timesteps), timesteps)
    return torch.where(inside == image, prediction, implied), inside


def clipped(image: Tensor, kind: str) -> Tensor:
    """Clip images (B, C, H, W) to [-1, 1], dynamic or static."""
    if kind == "static":
        return image.clamp(-1, 1)
    scale = torch.quantile(image.abs().flatten(1), PERCENTILE, dim=1).clamp(min=1)
    scale = scale.view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    return image.clamp(-scale, scale) / scale
