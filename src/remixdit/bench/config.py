"""What a benchmark measures."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from remixdit.diffusion.dit import DiTConfig
from remixdit.training.config import PRECISIONS, MixtureConfig, TrainConfig

__all__ = ["BenchConfig", "runs_of", "setting", "shape_named"]

NAIVELY_MIXED = "attention+mlp"  # what the naive reference can mix


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What a benchmark measures; the defaults take a minute or two on two CPU cores."""

    network: str = "128x4/2"
    """Shape of the network: a published one, e.g. S/2 or B/4, or WIDTHxDEPTH/PATCH."""
    input_size: int = 16
    """Height and width of the latents, which have 4 channels."""
    batch_size: int = 20
    """Images in a training step, or in a trajectory."""
    num_bases: int = 4
    """Number of bases, K."""
    num_experts: int = 20
    """Number of experts, N."""
    experts_per_step: tuple[int, ...] = (0, 1)
    """Numbers of experts that share a training step, M, timed one after the other; 0 for all N."""
    mixed: str = NAIVELY_MIXED
    """Parameters to mix: attention+mlp, all, or patterns of names separated by commas."""
    steps: int = 8
    """Number of timed training steps, or trajectories, of each variant."""
    num_inference_steps: int = 250
    """Steps of a trajectory."""
    naive: bool = True
    """Time the naive implementation of mixing too."""
    memory: bool = True
    """Measure the peak memory of each variant, in a process of its own."""
    compile: bool = field(default_factory=torch.cuda.is_available)
    """Compile the networks of all variants; by default on a GPU only."""
    recompute: bool = False
    """Compute each block again in the backward pass instead of keeping its activations."""
    micro_batch_size: int = 0
    """Images of a training step that run at once; 0 for all."""
    precision: str = "fp32"
    """Precision of the arithmetic: fp32 or bf16."""
    device: str = "auto"
    """Device: auto, cpu or cuda."""
    seed: int = 0
    """Seed for weights, images, timesteps and noise."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("steps", "batch_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")
        if not self.experts_per_step:
            raise ValueError("experts_per_step must hold at least one number, got none")
        if self.naive and self.mixed != NAIVELY_MIXED:
            raise ValueError(
                f"naive must be false unless mixed is {NAIVELY_MIXED}, got mixed {self.mixed!r}"
            )

    def counts(self) -> tuple[int, ...]:
        """Return every M to time, once, in the order given."""
        return tuple(dict.fromkeys(count or self.num_experts for count in self.experts_per_step))

    def shape(self) -> DiTConfig:
        """Return the shape of the network."""
        return shape_named(self.network, self.input_size)


def shape_named(network: str, input_size: int) -> DiTConfig:
    """Return a published shape, e.g. S/2, or one given as WIDTHxDEPTH/PATCH."""
    size, _, patch = network.partition("/")
    if not size[:1].isdecimal():
        return DiTConfig.named(network, input_size=input_size)
    numbers = (*size.lower().split("x"), patch)
    if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"network must be SIZE/PATCH or WIDTHxDEPTH/PATCH, got {network!r}")
    width, depth, edge = (int(number) for number in numbers)
    return DiTConfig(
        input_size=input_size,
        patch_size=edge,
        hidden_size=width,
        depth=depth,
        num_heads=max(1, width // 64),
    )


def setting(count: int) -> str:
    """Return the name of the setting in which M experts share a step."""
    return f"M={count}"


def runs_of(config: BenchConfig) -> dict[str, TrainConfig]:
    """Return the training runs whose steps are timed; K = N = 1 is the plain DiT."""
    mixtures = {"plain": MixtureConfig(num_bases=1, num_experts=1, mixed=config.mixed)}
    for count in config.counts():
        mixtures[f"remix {setting(count)}"] = MixtureConfig(
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
            micro_batch_size=config.micro_batch_size,
            seed=config.seed,
            device=config.device,
            precision=config.precision,
            compile=config.compile,
            recompute=config.recompute,
            network=config.shape(),
            mixture=mixture,
        )
        for name, mixture in mixtures.items()
    }
