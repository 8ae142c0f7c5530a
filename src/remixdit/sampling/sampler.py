"""From noise to images: one denoising loop over diffusers' schedulers.

A trajectory visits S of the T timesteps, evenly spaced, from noise to data. A scheduler gets the
respaced process (its betas, S of them), so that its index i stands for our timestep t[i]:

    output = network(latents, t[i], class_labels)    the expert of t[i], mixed when it changes
    output = thresholded(output)                     if asked for, in pixel space
    latents = scheduler(output, i, latents)

DDPM is ours, because of the learned variance; DDIM, DPM-Solver++ and Euler are diffusers'.
Image i draws its noise from (seed, i) alone: any batch size and any number of processes give the
same images.

Shapes: B batch, C H W latents, S steps.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from remixdit.data.autoencoder import Autoencoder
from remixdit.diffusion.noise import Diffusion
from remixdit.model.model import RemixDiT
from remixdit.sampling.thresholding import THRESHOLDINGS, thresholded
from remixdit.seeds import generator_for

__all__ = [
    "DenoisingStep",
    "Samples",
    "SamplingConfig",
    "denoising_steps",
    "sample",
    "sample_latents",
    "spaced_timesteps",
]

SCHEDULERS = ("auto", "ddpm", "ddim", "dpm++", "euler")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampler, guidance, and number of images."""

    num_images: int = 64
    """Number of images."""
    class_labels: tuple[int, ...] = ()
    """Class labels through which images cycle by index; empty for all classes."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance, at least 1; 1 for no guidance."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Range between data (0) and noise (1) in which guidance acts (arXiv:2404.07724)."""
    guidance_channels: int = 0
    """Number of guided channels; 0 for all. 3 reproduces a slip in DiT's published samples."""
    scheduler: str = "auto"
    """Sampler: ddpm, ddim, dpm++, euler (flow matching only) or auto (ddpm or euler)."""
    num_inference_steps: int = 250
    """Number of sampling steps, S."""
    thresholding: str = "none"
    """Clipping of the image predicted at each step, in pixel space only: none, static or dynamic.
    static clips to [-1, 1], as DDPM and ADM do; dynamic is that of Imagen (arXiv:2205.11487)."""
    batch_size: int = 64
    """Number of images in one forward pass. It does not change the images."""
    seed: int = 0
    """Seed; image i depends on the seed and i alone."""
    precompute: bool = False
    """Mix all N experts once and keep them, instead of one at each interval's boundary."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not 1 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale must be at least 1, got {self.guidance_scale}")
        for name in ("num_images", "num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.scheduler not in SCHEDULERS:
            raise ValueError(
                f"scheduler must be one of {', '.join(SCHEDULERS)}, got {self.scheduler!r}"
            )
        if self.thresholding not in THRESHOLDINGS:
            raise ValueError(
                f"thresholding must be one of {', '.join(THRESHOLDINGS)}, got {self.thresholding!r}"
            )
        if self.guidance_channels < 0:
            raise ValueError(f"guidance_channels must be at least 0, got {self.guidance_channels}")
        start, stop = self.guidance_interval
        if not 0 <= start <= stop <= 1:
            raise ValueError(f"guidance_interval must rise within [0, 1], got {start}, {stop}")

    def resolved_scheduler(self, model: RemixDiT) -> str:
        """Return the scheduler's name, if it and the thresholding fit the model."""
        if self.thresholding != "none" and not model.config.is_of_pixels:
            raise ValueError(
                "thresholding must be none for a model of latents, which have no range as pixels "
                f"have, got {self.thresholding}"
            )
        fitting = ("euler",) if model.config.is_flow else ("ddpm", "ddim", "dpm++")
        if self.scheduler == "auto":
            return fitting[0]
        if self.scheduler not in fitting:
            raise ValueError(
                f"scheduler must be one of {', '.join(fitting)} for "
                f"{model.config.prediction_type}, got {self.scheduler}"
            )
        return self.scheduler

    def summary(self, model: RemixDiT) -> str:
        """Return how images are drawn, for the title of a picture of them.

        Args:
            model: Model that draws them, which decides what the scheduler `auto` is.
        """
        scale = self.guidance_scale
        guidance = f"guidance {scale:g}" if scale > 1 else "no guidance"
        scheduler = self.resolved_scheduler(model)
        clips = "" if self.thresholding == "none" else f", {self.thresholding} thresholding"
        steps = f"{self.num_inference_steps} steps of {scheduler}"
        return f"{steps}, {guidance}{clips}, seed {self.seed}"


class Samples(NamedTuple):
    """A batch of finished images."""

    indices: tuple[int, ...]
    """Indices of the images, in [0, num_images)."""
    images: np.ndarray
    """(B, H, W, C) uint8."""
    class_labels: np.ndarray
    """(B,) int64; all 0 for an unconditional model."""


class Trajectory(NamedTuple):
    """The steps of a scheduler: the network's timesteps, and the step from its output."""

    timesteps: Tensor
    """(S,) our timesteps, from noise to data."""
    step: Callable[[Tensor, int, Tensor, Sequence[torch.Generator]], Tensor]
    """(output, number of the step, latents, generator of each image) -> next latents."""


class DenoisingStep(NamedTuple):
    """What one step of a trajectory has made."""

    timestep: float
    """Timestep that the network was given."""
    expert: int
    """Expert that owns it."""
    latents: Tensor
    """(B, C, H, W) latents after the step."""
    pred_latents: Tensor
    """(B, C, H, W) clean latents that the network's output implies, clipped by a thresholding."""


def sample(
    model: RemixDiT,
    autoencoder: Autoencoder,
    config: SamplingConfig,
    rank: int = 0,
    num_ranks: int = 1,
) -> Iterator[Samples]:
    """Draw images batch by batch; with several processes, each draws every num_ranks-th batch."""
    labels = labels_of(model, config)
    batches = range(0, config.num_images, config.batch_size)
    for start in batches[rank::num_ranks]:
        indices = tuple(range(start, min(start + config.batch_size, config.num_images)))
        latents = sample_latents(model, config, indices)
        images = autoencoder.decode(latents).cpu().numpy()
        yield Samples(indices, images, labels[list(indices)].numpy())


def sample_latents(model: RemixDiT, config: SamplingConfig, indices: Sequence[int]) -> Tensor:
    """Draw the latents of the images with the given indices: (B, C, H, W) float32."""
    for step in denoising_steps(model, config, indices):
        latents = step.latents
    return latents


@torch.no_grad()
def denoising_steps(
    model: RemixDiT, config: SamplingConfig, indices: Sequence[int]
) -> Iterator[DenoisingStep]:
    """Draw the images with the given indices, and yield their latents after each of the S steps.

    The trajectory falls through the intervals, so it mixes each expert at most once.
    """
    network, device = model.config.network, model.device
    shape = (network.in_channels, network.input_size, network.input_size)
    generators = [generator_for(config.seed, "sample", index) for index in indices]
    latents = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    labels = labels_of(model, config)[list(indices)].to(device)
    trajectory = trajectory_of(model, config)
    if config.precompute:
        model.precompute()
    experts = model.intervals.expert_at(trajectory.timesteps).tolist()
    for number, (timestep, expert) in enumerate(
        zip(trajectory.timesteps.tolist(), experts, strict=True)
    ):
        output = guided_output(model, config, expert, latents, timestep, labels)
        prediction, variance = output[:, : shape[0]], output[:, shape[0] :]
        times = torch.full((len(latents),), timestep, device=device)
        prediction, pred_latents = thresholded(
            config.thresholding, model.process, prediction, latents, times
        )
        if config.thresholding != "none":
            output = torch.cat([prediction, variance], dim=1)
        latents = trajectory.step(output, number, latents, generators)
        yield DenoisingStep(timestep, expert, latents, pred_latents)


def labels_of(model: RemixDiT, config: SamplingConfig) -> Tensor:
    """Return (num_images,) the label of every image; zeros for an unconditional model."""
    num_classes = model.config.network.num_classes
    outside = [label for label in config.class_labels if not 0 <= label < max(1, num_classes)]
    if outside:
        raise ValueError(f"class_labels must be in [0, {num_classes}), got {outside[0]}")
    if config.guidance_scale > 1 and not num_classes:
        raise ValueError(
            f"guidance_scale must be 1 for an unconditional model, got {config.guidance_scale}"
        )
    cycle = torch.tensor(config.class_labels or range(max(1, num_classes)))
    return cycle[torch.arange(config.num_images) % len(cycle)]


def guided_output(
    model: RemixDiT,
    config: SamplingConfig,
    expert: int,
    latents: Tensor,
    timestep: float,
    class_labels: Tensor,
) -> Tensor:
    """Return the network's output at one timestep, with guidance where it acts.

        guided = null + guidance_scale * (conditional - null)

    Args:
        model: Model whose `expert` predicts.
        config: Scale, interval and channels of the guidance.
        expert: Expert that owns the timestep.
        latents: (B, C, H, W).
        timestep: Timestep of all latents.
        class_labels: (B,).

    Returns:
        (B, out_channels, H, W); the variance is that of the conditional output.
    """
    times = torch.full((len(latents),), timestep, device=latents.device)
    share = timestep / model.intervals.boundaries[-1]
    low, high = config.guidance_interval
    if config.guidance_scale == 1 or not low <= share <= high:
        return model.predict(expert, latents, times, class_labels)
    null = torch.full_like(class_labels, model.config.network.num_classes)
    both = model.predict(
        expert,
        torch.cat([latents, latents]),
        torch.cat([times, times]),
        torch.cat([class_labels, null]),
    )
    conditional, unconditional = both.chunk(2)
    channels = min(config.guidance_channels or latents.shape[1], latents.shape[1])
    guided = conditional.clone()
    guided[:, :channels] = torch.lerp(
        unconditional[:, :channels], conditional[:, :channels], config.guidance_scale
    )
    return guided


def spaced_timesteps(num_inference_steps: int, num_train_timesteps: int = 1000) -> Tensor:
    """Return (S,) rising integers, evenly spaced from 0 to T - 1 and rounded, as ADM spaces them.

    One step alone is taken from pure noise, T - 1.
    """
    if num_inference_steps > num_train_timesteps:
        raise ValueError(
            f"num_inference_steps must be at most {num_train_timesteps}, got {num_inference_steps}"
        )
    last = num_train_timesteps - 1
    if num_inference_steps == 1:
        return torch.tensor([last])
    positions = torch.arange(num_inference_steps, dtype=torch.float64)
    return (positions * (last / (num_inference_steps - 1))).round().long()


def trajectory_of(model: RemixDiT, config: SamplingConfig) -> Trajectory:
    """Return the steps from noise to data of the configured scheduler."""
    name = config.resolved_scheduler(model)
    if not isinstance(model.process, Diffusion):
        return euler_trajectory(config.num_inference_steps)
    spaced = spaced_timesteps(config.num_inference_steps, model.process.num_train_timesteps)
    respaced = model.process.respaced(spaced)
    if name == "ddpm":
        return ddpm_trajectory(respaced, spaced)
    return diffusers_trajectory(name, respaced, spaced)


def ddpm_trajectory(process: Diffusion, spaced: Tensor) -> Trajectory:
    """Ancestral sampling from the predicted mean and variance.

    arXiv:2006.11239; arXiv:2102.09672 for the variance.
    """
    last = len(spaced) - 1

    def step(
        output: Tensor, number: int, latents: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        index = torch.full((len(latents),), last - number, device=latents.device)
        predicted = process.posterior(output, latents, index)
        if number == last:
            return predicted.mean
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
        return predicted.mean + (predicted.log_variance / 2).exp() * noise.to(latents.device)

    return Trajectory(spaced.flip(0), step)


def diffusers_trajectory(name: str, process: Diffusion, spaced: Tensor) -> Trajectory:
    """Deterministic DDIM or second-order multistep DPM-Solver++, by diffusers."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    common: dict[str, Any] = {
        "num_train_timesteps": len(spaced),
        "trained_betas": process.betas.numpy(),
        "prediction_type": process.prediction_type,
    }
    if name == "ddim":
        scheduler = DDIMScheduler(**common, clip_sample=False, timestep_spacing="trailing")
    else:
        scheduler = DPMSolverMultistepScheduler(**common, timestep_spacing="trailing")
    scheduler.set_timesteps(len(spaced))

    def step(
        output: Tensor, number: int, latents: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        # The schedulers know nothing of variance channels.
        prediction = output[:, : latents.shape[1]]
        return scheduler.step(prediction, scheduler.timesteps[number], latents)["prev_sample"]

    return Trajectory(spaced.flip(0), step)


def euler_trajectory(num_inference_steps: int) -> Trajectory:
    """Euler steps of equal length from t = 1 to t = 0, by diffusers."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    times = torch.linspace(1, 0, num_inference_steps + 1)[:-1]
    scheduler.set_timesteps(sigmas=times.tolist())

    def step(
        output: Tensor, number: int, latents: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        return scheduler.step(output, scheduler.timesteps[number], latents)["prev_sample"]

    return Trajectory(times, step)
