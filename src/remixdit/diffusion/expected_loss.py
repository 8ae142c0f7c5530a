"""The loss to expect at each timestep, known before there is a network.

Take images whose power falls with frequency f as 1 / f^2, as that of natural images does, and that
are normal otherwise. The best denoiser of these is linear (Wiener), and the mean square of its
error is

    error = mean over f of  S n^2 / (s^2 S + n^2),    noisy = s latents + n noise

with the power S of each frequency. Of epsilon the loss is s^2 / n^2 times as much, of v prediction
and of flow matching 1 / n^2 times.

The gradient of an image has about the size of the root of its loss; of epsilon it was measured to
grow to four times that at the least noisy timesteps, about as (1 + SNR / 100)^(1/4). Images drawn
in proportion to that size give the least noisy gradient of a batch (importance sampling). So
intervals are cut where four fifths of that size and one fifth of the log-SNR have moved by equal
steps: the mixture leaves no timestep far behind if the guess is wrong. Where timesteps are not
drawn uniformly, the size counts in proportion to their density.

Shapes: T timesteps.
"""

import torch
from torch import Tensor

from remixdit.diffusion.intervals import LogitNormal, Uniform, moved
from remixdit.diffusion.noise import Diffusion, Flow

__all__ = ["LATENT_STD", "PIXEL_STD", "expected_losses", "gradient_curve"]

PIXEL_STD, LATENT_STD = 0.5, 1.0  # of pixels in [-1, 1], and of scaled latents
LOG_SNR_SHARE = 0.2
LARGEST = 64  # frequencies beyond hold next to no power


def expected_losses(process: Diffusion | Flow, times: Tensor, size: int, std: float) -> Tensor:
    """Return the loss of the best linear denoiser at each of the given times, float64.

    Args:
        process: Noise process, which states the target.
        times: (T,) timesteps: integers in [0, T), or floats in (0, 1) of flow matching.
        size: Height and width of the images or latents.
        std: Standard deviation of their values.
    """
    if isinstance(process, Diffusion):
        signal = process.alphas_cumprod[times]  # s^2
        noise = 1 - signal
    else:
        signal, noise = (1 - times.double()).square(), times.double().square()
    signal, noise = signal[:, None], noise[:, None]
    power = natural_power(min(size, LARGEST)) * std**2
    error = (power * noise / (signal * power + noise)).mean(1)
    if process.prediction_type == "epsilon":
        return error * (signal / noise)[:, 0]
    return error / noise[:, 0]


def gradient_curve(
    process: Diffusion | Flow,
    times: Tensor,
    size: int,
    std: float,
    distribution: Uniform | LogitNormal | None = None,
) -> Tensor:
    """Return how much of the gradient is expected before each time: (T,) float64, from 0 to 1.

    Args:
        process: Noise process, which states the target.
        times: (T,) rising times, as `expected_losses` takes them.
        size: Height and width of the images or latents.
        std: Standard deviation of their values.
        distribution: Distribution of the times of flow matching; None for uniform.
    """
    log_snr = process.log_snr[times] if isinstance(process, Diffusion) else process.log_snr(times)
    gradient = expected_losses(process, times, size, std).sqrt()
    if process.prediction_type == "epsilon":
        gradient *= (1 + log_snr.exp() / 100) ** 0.25
    if distribution is not None:
        gradient *= distribution.density(times.double())
    by_loss, by_log_snr = moved(gradient.cumsum(0) - gradient), moved(log_snr)
    return (1 - LOG_SNR_SHARE) * by_loss + LOG_SNR_SHARE * by_log_snr


def natural_power(size: int) -> Tensor:
    """Return (size^2,) the power of each frequency, 1 / f^2, with mean 1; constants as f = 1."""
    frequency = torch.fft.fftfreq(size, dtype=torch.float64) * size
    power = 1 / (frequency[:, None].square() + frequency.square()).clamp(min=1)
    return (power / power.mean()).flatten()
