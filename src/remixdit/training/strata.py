"""The intervals of timesteps of a run: those of its experts, or the strata of a plain DiT."""

from dataclasses import replace
from functools import partial

import torch

from remixdit.diffusion.expected_loss import LATENT_STD, PIXEL_STD, gradient_curve
from remixdit.diffusion.intervals import Intervals, LogitNormal, Uniform
from remixdit.diffusion.noise import Diffusion, Flow
from remixdit.model.config import RemixConfig, noise_process
from remixdit.training.config import TrainConfig

__all__ = ["cut_intervals", "distribution_of", "training_strata"]


def training_strata(model: RemixConfig, config: TrainConfig) -> Intervals:
    """Return the intervals in which timesteps are drawn: the experts', or a plain DiT's strata."""
    intervals, strata = model.intervals(), config.objective.timestep_strata
    only = config.objective.only_interval()
    strata = only[1] if only else strata
    if model.num_experts == 1 and strata > 1:
        intervals = cut_intervals(model, strata, config.interval_policy, distribution_of(config))
    return replace(intervals, distribution=distribution_of(config))


def distribution_of(config: TrainConfig) -> Uniform | LogitNormal:
    """Return the distribution of the training timesteps."""
    return LogitNormal() if config.objective.logit_normal else Uniform()


def cut_intervals(
    config: RemixConfig,
    count: int,
    policy: str,
    distribution: Uniform | LogitNormal | None = None,
) -> Intervals:
    """Cut the timesteps of a model's noise process into intervals.

    Args:
        config: Configuration of the model.
        count: Number of intervals.
        policy: What is equal in all of them: "uniform" (width in timesteps), "log_snr" (width in
            log-SNR) or "loss" (the gradient to expect).
        distribution: Distribution of the times of flow matching, on which the gradient depends;
            None for uniform.
    """
    process: Diffusion | Flow = noise_process(config)
    std = PIXEL_STD if config.is_of_pixels else LATENT_STD
    size = config.network.input_size
    if isinstance(process, Diffusion):
        if policy == "uniform":
            return Intervals.uniform(count, config.num_train_timesteps)
        if policy == "log_snr":
            return Intervals.by_curve(count, process.log_snr)
        times = torch.arange(config.num_train_timesteps)
        return Intervals.by_curve(count, gradient_curve(process, times, size, std))
    if policy == "uniform":
        return Intervals.continuous(count)
    if policy == "log_snr":
        return Intervals.continuous_by_curve(count, process.log_snr)
    curve = partial(gradient_curve, process, size=size, std=std, distribution=distribution)
    return Intervals.continuous_by_curve(count, curve)
