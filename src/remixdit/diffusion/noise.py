"""Noise processes: the noising of latents, the target of the network, and the loss.

`Diffusion` (discrete, 0 is the least noisy of T timesteps; arXiv:2006.11239):

    noisy = sqrt(a) latents + sqrt(1 - a) noise,    a = prod(1 - betas)[timestep]
    epsilon: target = noise;    v_prediction: target = sqrt(a) noise - sqrt(1 - a) latents

with, if the network predicts its variance too, the hybrid loss of arXiv:2102.09672. `Flow`
(continuous; arXiv:2209.03003): t = 0 is data, t = 1 is noise,

    noisy = (1 - t) latents + t noise,    target = noise - latents

Losses are computed in float32, one number for each image.
Shapes: B batch, C H W latents, T timesteps.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Diffusion", "Flow", "Loss", "Posterior", "linear_betas"]


class Loss(NamedTuple):
    """Losses of a batch; every tensor is (B,)."""

    total: Tensor
    """Loss that training minimises."""
    mse: Tensor
    """Mean squared error of the prediction."""
    variance_bound: Tensor
    """Term of the variational bound in bits per dimension; 0 without a learned variance."""


class Posterior(NamedTuple):
    """p(x[t - 1] given x[t]); every tensor is (B, C, H, W)."""

    mean: Tensor
    log_variance: Tensor
    pred_latents: Tensor
    """The clean latents that the prediction implies."""


def linear_betas(num_train_timesteps: int = 1000) -> Tensor:
    """Return (T,) float64 variances from 1e-4 to 0.02, scaled when T is not 1000."""
    scale = 1000 / num_train_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_train_timesteps, dtype=torch.float64)


class Diffusion:
    """Discrete diffusion with epsilon or v prediction, the variance learned or fixed.

    Args:
        prediction_type: Prediction of the network: "epsilon" or "v_prediction".
        learn_sigma: Whether the network outputs (B, 2C, H, W), the second half the variance.
        betas: (T,) float64 variances of the forward process.
    """

    def __init__(
        self,
        prediction_type: str = "epsilon",
        learn_sigma: bool = True,
        betas: Tensor | None = None,
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"prediction_type must be epsilon or v_prediction, got {prediction_type!r}"
            )
        self.prediction_type = prediction_type
        self.learn_sigma = learn_sigma
        self.betas = (linear_betas() if betas is None else betas).double()
        if not bool(((self.betas > 0) & (self.betas < 1)).all()):
            raise ValueError("betas must be between 0 and 1")
        signal = torch.cumprod(1 - self.betas, dim=0)  # (T,), the a above
        before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
        variance = self.betas * (1 - before) / (1 - signal)  # of q(x[t-1] | x[t], x[0])
        self.alphas_cumprod = signal
        self._tables = {
            "signal": signal.sqrt(),
            "noise": (1 - signal).sqrt(),
            "mean_latents": self.betas * before.sqrt() / (1 - signal),
            "mean_noisy": (1 - before) * (1 - self.betas).sqrt() / (1 - signal),
            "max_log_variance": self.betas.log(),
            # The variance is 0 at the last step; its logarithm takes the next one's value.
            "min_log_variance": torch.cat([variance[1:2], variance[1:]]).log()
            if len(variance) > 1
            else self.betas.log(),
        }
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps, T."""
        return len(self.betas)

    @property
    def log_snr(self) -> Tensor:
        """(T,) float64, falling: log of signal over noise variance."""
        return torch.log(self.alphas_cumprod / (1 - self.alphas_cumprod))

    def network_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return the input of the network's timestep embedding: the timesteps themselves."""
        return timesteps

    def respaced(self, timesteps: Tensor) -> "Diffusion":
        """Return the shorter process that visits only `timesteps` (S,), rising, of this one."""
        signal = self.alphas_cumprod[timesteps]
        before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
        return Diffusion(self.prediction_type, self.learn_sigma, 1 - signal / before)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise latents (B, C, H, W) to integer timesteps (B,)."""
        signal, scale = self._at("signal", timesteps), self._at("noise", timesteps)
        return signal * latents + scale * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return (B, C, H, W), the target of the network."""
        if self.prediction_type == "epsilon":
            return noise
        return self._at("signal", timesteps) * noise - self._at("noise", timesteps) * latents

    def pred_latents(self, prediction: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """Return (B, C, H, W), the clean latents that a prediction (no variance) implies."""
        signal, scale = self._at("signal", timesteps), self._at("noise", timesteps)
        if self.prediction_type == "epsilon":
            return (noisy_latents - scale * prediction) / signal
        return signal * noisy_latents - scale * prediction

    def pred_noise(self, latents: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """Return (B, C, H, W), the noise between clean and noisy latents."""
        signal, scale = self._at("signal", timesteps), self._at("noise", timesteps)
        return (noisy_latents - signal * latents) / scale

    def loss(self, model_output: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Loss:
        """Return the loss of each image.

        Args:
            model_output: (B, C or 2C, H, W) at `add_noise(latents, noise, timesteps)`.
            latents: (B, C, H, W) clean latents.
            noise: (B, C, H, W) standard normal noise.
            timesteps: (B,) integers in [0, T).
        """
        model_output = model_output.float()
        prediction, _ = self._split(model_output)
        error = self.target(latents, noise, timesteps) - prediction
        mse = error.square().flatten(1).mean(1)
        if not self.learn_sigma:
            return Loss(mse, mse, torch.zeros_like(mse))
        bound = self._variance_bound(model_output, latents, noise, timesteps)
        return Loss(mse + bound * (self.num_train_timesteps / 1000), mse, bound)

    def posterior(
        self, model_output: Tensor, noisy_latents: Tensor, timesteps: Tensor
    ) -> Posterior:
        """Return p(x[t - 1] given x[t]) as predicted, without clipping.

        Args:
            model_output: (B, C or 2C, H, W); a fixed variance is the forward process's own.
            noisy_latents: (B, C, H, W) at `timesteps`.
            timesteps: (B,) integers in [0, T).
        """
        prediction, variance = self._split(model_output)
        pred_latents = self.pred_latents(prediction, noisy_latents, timesteps)
        mean = self._mean(pred_latents, noisy_latents, timesteps)
        high = self._at("max_log_variance", timesteps)
        if variance is None:
            return Posterior(mean, high.expand_as(mean), pred_latents)
        # The network places the log-variance between its bounds (equation 15 of arXiv:2102.09672).
        share = (variance + 1) / 2
        log_variance = share * high + (1 - share) * self._at("min_log_variance", timesteps)
        return Posterior(mean, log_variance, pred_latents)

    def bound_term(
        self, model_output: Tensor, latents: Tensor, noisy_latents: Tensor, timesteps: Tensor
    ) -> Tensor:
        """Return (B,) the term of the variational bound at each timestep, in bits per dimension.

            KL(q(x[t - 1] | x[t], x[0]) || p(x[t - 1] | x[t])),    -log p(x[0] | x[1]) at t = 0

        Summed over all T timesteps, with `prior_term`, they bound the bits of an image
        (section 3 of arXiv:2006.11239). Without a learned variance p has the forward process's.

        Args:
            model_output: (B, C or 2C, H, W) at `noisy_latents`.
            latents: (B, C, H, W) clean latents, pixels in [-1, 1].
            noisy_latents: (B, C, H, W) at `timesteps`.
            timesteps: (B,) integers in [0, T).
        """
        predicted = self.posterior(model_output, noisy_latents, timesteps)
        true_mean = self._mean(latents, noisy_latents, timesteps)
        true_log_variance = self._at("min_log_variance", timesteps)
        divergence = normal_kl(true_mean, true_log_variance, predicted.mean, predicted.log_variance)
        likelihood = discretized_log_likelihood(latents, predicted.mean, predicted.log_variance)
        last = (timesteps == 0).view(-1, 1, 1, 1)
        return torch.where(last, -likelihood, divergence).flatten(1).mean(1) / math.log(2)

    def prior_term(self, latents: Tensor) -> Tensor:
        """Return (B,) KL(q(x[T] | x[0]) || standard normal), in bits per dimension."""
        last = torch.full((len(latents),), self.num_train_timesteps - 1, device=latents.device)
        mean, scale = self._at("signal", last) * latents, self._at("noise", last)
        zero = torch.zeros((), device=latents.device)
        return normal_kl(mean, 2 * scale.log(), zero, zero).flatten(1).mean(1) / math.log(2)

    def _variance_bound(
        self, model_output: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor
    ) -> Tensor:
        """Return (B,) bits per dimension; the mean is detached: only the variance is trained."""
        noisy = self.add_noise(latents, noise, timesteps)
        prediction, variance = model_output.chunk(2, dim=1)
        frozen = torch.cat([prediction.detach(), variance], dim=1)
        return self.bound_term(frozen, latents, noisy, timesteps)

    def _mean(self, latents: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """Return the mean of q(x[t - 1] | x[t], x[0])."""
        return (
            self._at("mean_latents", timesteps) * latents
            + self._at("mean_noisy", timesteps) * noisy_latents
        )

    def _split(self, model_output: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split the prediction from the variance, if there is one."""
        if not self.learn_sigma:
            return model_output, None
        prediction, variance = model_output.chunk(2, dim=1)
        return prediction, variance

    def _at(self, table: str, timesteps: Tensor) -> Tensor:
        """Return the entries of a table at `timesteps` (B,): (B, 1, 1, 1) float32."""
        device = timesteps.device
        if device not in self._on_device:
            tables = {name: values.float().to(device) for name, values in self._tables.items()}
            self._on_device[device] = tables
        return self._on_device[device][table][timesteps].view(-1, 1, 1, 1)


@dataclass(frozen=True)
class Flow:
    """Flow matching along straight lines, predicting the velocity (arXiv:2209.03003)."""

    prediction_type = "flow_prediction"
    learn_sigma = False
    num_train_timesteps = 1000

    @staticmethod
    def log_snr(timesteps: Tensor) -> Tensor:
        """Return the log of signal over noise variance at t in (0, 1)."""
        return 2 * torch.log((1 - timesteps) / timesteps)

    def network_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return the input of the network's timestep embedding, 1000 t, which fits its range."""
        return 1000 * timesteps

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise latents (B, C, H, W) to times (B,) in [0, 1]."""
        share = timesteps.view(-1, 1, 1, 1)
        return (1 - share) * latents + share * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return (B, C, H, W), the velocity from data to noise."""
        return noise - latents

    def pred_latents(self, prediction: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """Return (B, C, H, W), the clean latents that a predicted velocity implies."""
        return noisy_latents - timesteps.view(-1, 1, 1, 1) * prediction

    def pred_noise(self, latents: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """Return (B, C, H, W), the noise between clean and noisy latents; timesteps above 0."""
        share = timesteps.view(-1, 1, 1, 1)
        return (noisy_latents - (1 - share) * latents) / share

    def loss(self, model_output: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Loss:
        """Return the loss of each image; shapes as `Diffusion.loss`, timesteps in [0, 1]."""
        error = self.target(latents, noise, timesteps) - model_output.float()
        mse = error.square().flatten(1).mean(1)
        return Loss(mse, mse, torch.zeros_like(mse))


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return KL(normal 1 || normal 2) of each element, in nats."""
    ratio = log_variance1 - log_variance2
    distance = (mean1 - mean2).square() * torch.exp(-log_variance2)
    return 0.5 * (torch.exp(ratio) - 1 - ratio + distance)


def discretized_log_likelihood(values: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return log P(the bin of width 2/255 around each value in [-1, 1]) under a normal, in nats.

    The outermost bins reach to infinity (section 3.3 of arXiv:2006.11239).
    """
    inverse_std = torch.exp(-0.5 * log_variance)
    upper = normal_cdf((values - mean + 1 / 255) * inverse_std)
    lower = normal_cdf((values - mean - 1 / 255) * inverse_std)
    inside = torch.where(values > 0.999, 1 - lower, upper - lower)
    return torch.where(values < -0.999, upper, inside).clamp(min=1e-12).log()


def normal_cdf(values: Tensor) -> Tensor:
    """Approximate the standard normal distribution function by a tanh (as ADM, arXiv:2105.05233).

    The published losses were computed with it; its error is up to 3e-4.
    """
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)))
