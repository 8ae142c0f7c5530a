"""What is timed: steps of training and whole trajectories, each a function of its number.

Shapes: K bases, N experts, M experts of a step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from remixdit.bench.naive import NaiveMixture
from remixdit.bench.timing import Step
from remixdit.data import Batch
from remixdit.diffusion.dit import DiT, DiTConfig
from remixdit.diffusion.noise import Diffusion
from remixdit.first.optim import MixtureAdamW, OptimizerConfig
from remixdit.first.stacking import ExpertStack, stacks
from remixdit.model.config import RemixConfig
from remixdit.model.model import RemixDiT
from remixdit.sampling.sampler import SamplingConfig, sample_latents
from remixdit.seeds import generator_for
from remixdit.training.config import PRECISIONS, MixtureConfig, TrainConfig
from remixdit.training.step import Window, plan_step, step_inputs, train_step

__all__ = ["BenchConfig", "Builder", "run_of", "sampling_variants", "training_variants"]

Builder = Callable[[torch.device], Step]


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is timed."""

    network: str = "S/2"
    """A published shape, such as S/2 or B/4, or WIDTHxDEPTH/PATCH, such as 128x4/2."""
    input_size: int = 16
    """Edge of the latents, of 4 channels."""
    batch_size: int = 16
    """Images a step, or a trajectory."""
    num_bases: int = 4
    """K."""
    num_experts: int = 20
    """N."""
    experts_per_step: tuple[int, ...] = (1,)
    """The M to time, one after the other."""
    mixed: str = "attention+mlp"
    """What is mixed."""
    steps: int = 20
    """Of each variant that are timed, after a few that are not; for sampling, trajectories."""
    num_inference_steps: int = 250
    """Steps of a trajectory."""
    naive: bool = True
    """Time naive mixing too."""
    memory: bool = True
    """Measure peak memory too, of each variant in a process of its own."""
    compile: bool = True
    """Compile the update; with --compile-network the network too."""
    compile_network: bool = False
    """Compile the network of all variants."""
    recompute: bool = False
    """Compute blocks again on the way back, in all variants but the naive one."""
    precision: str = "fp32"
    """fp32 or bf16."""
    device: str = "auto"
    """auto, cpu or cuda."""
    seed: int = 0
    """Of weights and images."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")

    def shape(self) -> DiTConfig:
        """Return the network's shape."""
        size, _, patch = self.network.partition("/")
        if "x" not in size:
            return DiTConfig.named(self.network, input_size=self.input_size)
        width, depth = (int(number) for number in size.split("x"))
        return DiTConfig(
            input_size=self.input_size,
            patch_size=int(patch),
            hidden_size=width,
            depth=depth,
            num_heads=max(1, width // 64),
        )


def training_variants(config: BenchConfig) -> dict[str, Builder]:
    """Return what makes the steps of each variant: plain, ours for every M, naive."""
    variants: dict[str, Builder] = {
        name: partial(our_step, config, run) for name, run in run_of(config).items()
    }
    if config.naive:
        variants["naive"] = partial(naive_step, config)
    return variants


def run_of(config: BenchConfig) -> dict[str, TrainConfig]:
    """Return the training runs whose steps are timed; K = N = 1 is the plain DiT."""
    mixtures = {"plain": MixtureConfig(num_bases=1, num_experts=1, mixed=config.mixed)}
    for count in config.experts_per_step:
        mixtures[f"remix M={count}"] = MixtureConfig(
            num_bases=config.num_bases,
            num_experts=config.num_experts,
            experts_per_step=count,
            mixed=config.mixed,
        )
    return {
        name: TrainConfig(
            data="",
            output_dir=Path(),
            batch_size=config.batch_size,
            seed=config.seed,
            precision=config.precision,
            compile=config.compile_network,
            recompute=config.recompute,
            network=config.shape(),
            mixture=mixture,
        )
        for name, mixture in mixtures.items()
    }


def our_step(config: BenchConfig, run: TrainConfig, device: torch.device) -> Step:
    """Return a training step of ours."""
    num_experts, count = run.mixture.num_experts, run.strata_per_step
    model = build(config, run.mixture.num_bases, num_experts).to(device)
    optimizer = MixtureAdamW(model.mixture, OptimizerConfig(), compile=config.compile)
    model.mixture.cast_network(PRECISIONS[config.precision])
    model.network.recompute = config.recompute
    if config.compile_network:
        model.network.compile()
    stacked = not run.takes_turns and stacks(model.mixture, count)
    stack = ExpertStack(optimizer.gradients, count) if stacked else None
    batch, window = images(config), Window(num_experts, device)

    def step(index: int) -> None:
        plan = plan_step(model.intervals, count, config.batch_size, config.seed, index)
        inputs = step_inputs(model, batch, plan, run)
        train_step(model, optimizer.gradients, inputs, plan, window, stack)
        window.add_stats(optimizer.step(index, 1000))

    return step


def naive_step(config: BenchConfig, device: torch.device) -> Step:
    """Return a training step of the naive reference, one expert a step."""
    naive = NaiveMixture(
        DiT(config.shape(), config.seed).to(device), config.num_bases, config.num_experts
    )
    if config.compile_network:
        naive.network.compile()
    model = build(config, 1, 1)  # its noise process and intervals
    intervals = RemixConfig(num_experts=config.num_experts).intervals()
    run = run_of(config)["plain"]
    batch, process = images(config), Diffusion()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")

    def step(index: int) -> None:
        plan = plan_step(intervals, 1, config.batch_size, config.seed, index)
        inputs = step_inputs(model, batch, plan, run)
        latents, noise, timesteps, class_labels, *_ = (v.to(device) for v in inputs[1:])
        naive.expert = plan.strata[0]
        with autocast:
            noisy = process.add_noise(latents, noise, timesteps)
            output = naive.network(noisy, timesteps, class_labels)
        loss = process.loss(output, latents, noise, timesteps).total.mean()
        torch.autograd.backward(loss)
        naive.update()

    return step


def build(config: BenchConfig, num_bases: int, num_experts: int) -> RemixDiT:
    """Return a model of the benchmark's shape."""
    remix = RemixConfig(
        network=config.shape(), num_bases=num_bases, num_experts=num_experts, mixed=config.mixed
    )
    return RemixDiT(remix, seed=config.seed)


def images(config: BenchConfig) -> Batch:
    """Return a batch of noise."""
    generator = generator_for(config.seed, "bench")
    shape = (config.batch_size, 4, config.input_size, config.input_size)
    labels = torch.randint(1000, (config.batch_size,), generator=generator)
    latents = torch.randn(shape, generator=generator)
    return Batch(latents, labels, torch.arange(config.batch_size))


def sampling_variants(config: BenchConfig) -> dict[str, Builder]:
    """Return what makes trajectories: plain, ours mixed and pre-computed, naive."""
    mixture = (config.num_bases, config.num_experts)
    variants: dict[str, Builder] = {
        "plain": partial(trajectory_step, config, 1, 1, False),
        "mixed": partial(trajectory_step, config, *mixture, False),
        "precomputed": partial(trajectory_step, config, *mixture, True),
    }
    if config.naive:
        variants["naive"] = partial(naive_trajectory_step, config)
    return variants


def trajectory_step(
    config: BenchConfig, num_bases: int, num_experts: int, precompute: bool, device: torch.device
) -> Step:
    """Return one whole trajectory of a batch."""
    model = build(config, num_bases, num_experts).to(device)
    model.mixture.cast_network(PRECISIONS[config.precision])
    if config.compile_network:
        model.network.compile()
    return trajectory(model, config, precompute)


def naive_trajectory_step(config: BenchConfig, device: torch.device) -> Step:
    """Return one whole trajectory that mixes layer by layer at every step of the network."""
    return trajectory(NaiveModel(config).to(device), config, False)


def trajectory(model: RemixDiT, config: BenchConfig, precompute: bool) -> Step:
    """Return one whole trajectory of a batch."""
    sampling = SamplingConfig(
        num_images=config.batch_size, num_inference_steps=config.num_inference_steps
    )
    sampling = replace(sampling, precompute=precompute)

    def step(index: int) -> None:
        # Another expert is active at the end than at the start, so every trajectory mixes all.
        sample_latents(model, sampling, range(config.batch_size))

    return step


class NaiveModel(RemixDiT):
    """Answers the sampler with the naive mixture."""

    def __init__(self, config: BenchConfig) -> None:
        super().__init__(RemixConfig(network=config.shape(), num_experts=config.num_experts))
        network = DiT(config.shape(), config.seed)
        self.naive = NaiveMixture(network, config.num_bases, config.num_experts)
        self.naive_network = self.naive.network  # a module of this one, which moves along
        if config.compile_network:
            self.naive_network.compile()
        self.is_bfloat16 = config.precision == "bf16"

    def predict(
        self, expert: int, latents: Tensor, timesteps: Tensor, class_labels: Tensor | None
    ) -> Tensor:
        """Run one expert; shapes as `denoise`."""
        self.naive.expert = expert
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.is_bfloat16):
            return self.naive_network(latents, timesteps, class_labels)
