"""Whole trajectories to time: plain, ours mixed at boundaries and pre-computed, naive.

Shapes: K bases, N experts.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from remixdit import distributed
from remixdit.bench.config import BenchConfig
from remixdit.bench.naive import NaiveMixture
from remixdit.bench.timing import Step
from remixdit.diffusion.dit import DiT
from remixdit.model.config import RemixConfig
from remixdit.model.model import RemixDiT
from remixdit.sampling.sampler import SamplingConfig, sample_latents
from remixdit.training.config import PRECISIONS

__all__ = ["sampling_variants"]


def sampling_variants(config: BenchConfig) -> dict[str, Callable[[], Step]]:
    """Return what builds each variant: plain, ours mixed and pre-computed, naive."""
    variants: dict[str, Callable[[], Step]] = {
        "plain": partial(plain_trajectory, config),
        "mixed": partial(our_trajectory, config, False),
        "precomputed": partial(our_trajectory, config, True),
    }
    if config.naive:
        variants["naive"] = partial(naive_trajectory, config)
    return variants


def plain_trajectory(config: BenchConfig) -> Step:
    """Return a trajectory of the plain DiT."""
    return trajectory(built(config, 1, 1), config)


def our_trajectory(config: BenchConfig, precompute: bool) -> Step:
    """Return a trajectory of N experts."""
    return trajectory(built(config, config.num_bases, config.num_experts), config, precompute)


def naive_trajectory(config: BenchConfig) -> Step:
    """Return a trajectory in which every step mixes layer by layer."""
    return trajectory(NaiveModel(config), config)


def trajectory(model: RemixDiT, config: BenchConfig, precompute: bool = False) -> Step:
    """Return one whole trajectory of a batch."""
    sampling = SamplingConfig(
        num_images=config.batch_size,
        num_inference_steps=config.num_inference_steps,
        precompute=precompute,
    )

    def step(index: int) -> None:
        # The last expert of a trajectory is not the first, so each trajectory mixes all of them.
        sample_latents(model, sampling, range(config.batch_size))

    return step


def built(config: BenchConfig, num_bases: int, num_experts: int) -> RemixDiT:
    """Return a model as it samples."""
    device = distributed.pick_device(config.device)
    remix = RemixConfig(
        network=config.shape(), num_bases=num_bases, num_experts=num_experts, mixed=config.mixed
    )
    model = RemixDiT(remix, seed=config.seed).to(device).eval()
    dtype = PRECISIONS[config.precision]
    model.sample_with(None if dtype == torch.float32 else dtype, config.compile)
    return model


class NaiveModel(RemixDiT):
    """Answers the sampler with the naive mixture; its own network has no storage."""

    def __init__(self, config: BenchConfig) -> None:
        shape, device = config.shape(), distributed.pick_device(config.device)
        with torch.device("meta"):
            outline = DiT(shape)
        super().__init__(RemixConfig(network=shape, num_experts=config.num_experts), outline)
        network = DiT(shape, config.seed).to(device).eval()
        self.naive = NaiveMixture(network, config.num_bases, config.num_experts)
        if config.compile:
            network.compile()
        self.precision = PRECISIONS[config.precision]

    @property
    def device(self) -> torch.device:
        """Where the naive mixture is."""
        return self.naive.logits.device

    @torch.no_grad()
    def predict(
        self, expert: int, latents: Tensor, timesteps: Tensor, class_labels: Tensor | None
    ) -> Tensor:
        """Run one expert; shapes as `denoise`."""
        self.naive.choose(expert)
        enabled = self.precision != torch.float32
        with torch.autocast(latents.device.type, self.precision, enabled=enabled):
            return self.naive.network(latents, timesteps, class_labels)
