"""What this machine does: a training step and a trajectory, ours beside plain and naive.

All variants take turns in one run, so that a machine that slows down slows all of them; what is
quoted are medians and their ratios.

Shapes: K bases, N experts, M experts of a step.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from remixdit import distributed
from remixdit.costs import training_flops
from remixdit.data import Batch, Loader, ShardDataset
from remixdit.dit import DiT, DiTConfig
from remixdit.machine import bytes_per_second, machine, matrix_flops_per_second
from remixdit.model import RemixConfig, RemixDiT
from remixdit.naive import NaiveMixture
from remixdit.objectives import Diffusion
from remixdit.optim import MixtureAdamW, OptimizerConfig
from remixdit.sampling import SamplingConfig, sample_latents
from remixdit.seeds import generator_for
from remixdit.stacking import ExpertStack, stacks
from remixdit.train_config import PRECISIONS, MixtureConfig, TrainConfig
from remixdit.train_step import Window, plan_step, step_inputs, train_step

__all__ = [
    "BenchConfig",
    "LoaderConfig",
    "Timing",
    "Under",
    "bench_loader",
    "bench_sampling",
    "bench_training",
]


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
    compile: bool = True
    """Compile the update; with --compile-network the network too."""
    compile_network: bool = False
    """Compile the network of all variants."""
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


class Under(NamedTuple):
    """What is under way."""

    name: str
    done: int
    """Rounds that were timed."""


class Timing(NamedTuple):
    """How one variant did."""

    name: str
    seconds: tuple[float, ...]
    """Of each step."""
    peak_bytes: int | None
    """Most memory in use at once, on a GPU."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; times in milliseconds."""
        times = sorted(1000 * value for value in self.seconds)
        quarter = len(times) // 4
        return {
            "median_ms": median(times),
            "quartiles_ms": [times[quarter], times[-1 - quarter]],
            "steps": len(times),
            "peak_bytes": self.peak_bytes,
        }


Step = Callable[[int], None]


def bench_training(config: BenchConfig) -> Iterator[dict[str, Any] | Under]:
    """Time training steps; yields what is under way, and last the result."""
    device = distributed.pick_device(config.device)
    variants: dict[str, Step] = {"plain": our_step(config, device, 1, 1, 1)}
    for count in config.experts_per_step:
        name = f"remix M={count}"
        variants[name] = our_step(config, device, config.num_bases, config.num_experts, count)
    if config.naive:
        variants["naive"] = naive_step(config, device)
    timings = {}
    for progress in take_turns(variants, config.steps, device):
        if isinstance(progress, Under):
            yield progress
        else:
            timings[progress.name] = progress
    yield training_result(config, device, timings)


def training_result(
    config: BenchConfig, device: torch.device, timings: dict[str, Timing]
) -> dict[str, Any]:
    """Return the figures of all variants, their ratios and the floor of memory."""
    flops = training_flops(config.shape(), config.batch_size)
    peak = matrix_flops_per_second(device, PRECISIONS[config.precision])
    plain = median(timings["plain"].seconds)
    floor = update_floor_seconds(config, device)
    first = f"remix M={config.experts_per_step[0]}"
    remix = median(timings[first].seconds)
    result: dict[str, Any] = {
        "config": asdict(config),
        "machine": machine(device),
        "variants": {name: timing.to_json() for name, timing in timings.items()},
        "remix_over_plain": remix / plain,
        "floor_over_plain": (plain + floor) / plain,
        "floor_extra_ms": 1000 * floor,
        "flops_per_step": flops,
        "share_of_peak": {name: flops / median(t.seconds) / peak for name, t in timings.items()},
        "peak_flops_per_second": peak,
        "state_bytes": state_bytes(config),
    }
    if "naive" in timings:
        result["naive_over_remix"] = median(timings["naive"].seconds) / remix
    for count in config.experts_per_step[1:]:
        name = f"remix M={count}"
        result[f"{name} over {first}"] = median(timings[name].seconds) / remix
    return result


def take_turns(
    variants: dict[str, Step], steps: int, device: torch.device, warmup: int = 3
) -> Iterator[Timing | Under]:
    """Run the variants in turn, step by step; yields what is under way, then the timings."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, int | None] = dict.fromkeys(variants)
    for index in range(warmup + steps):
        for name, step in variants.items():
            yield Under(name, max(0, index - warmup))
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            step(index)
            if device.type == "cuda":
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        yield Timing(name, tuple(values), peaks[name])


def our_step(
    config: BenchConfig, device: torch.device, num_bases: int, num_experts: int, count: int
) -> Step:
    """Return a training step of ours; K = N = 1 is the plain DiT, through the same code."""
    mixture = MixtureConfig(
        num_bases=num_bases, num_experts=num_experts, experts_per_step=count, mixed=config.mixed
    )
    run = TrainConfig(
        data="", output_dir=Path(), batch_size=config.batch_size, seed=config.seed, mixture=mixture
    )
    model = build(config, num_bases, num_experts).to(device)
    optimizer = MixtureAdamW(model.mixture, OptimizerConfig(), compile=config.compile)
    model.mixture.cast_network(PRECISIONS[config.precision])
    if config.compile_network:
        model.network.compile()
    stack = ExpertStack(model.mixture, count) if stacks(model.mixture, count) else None
    batch, window = images(config), Window(num_experts, device)

    def step(index: int) -> None:
        plan = plan_step(model.intervals, count, config.batch_size, config.seed, index)
        train_step(model, step_inputs(model, batch, plan, run), plan, window, stack)
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
    run = TrainConfig(
        data="",
        output_dir=Path(),
        batch_size=config.batch_size,
        seed=config.seed,
        mixture=MixtureConfig(num_bases=1, num_experts=1),
    )
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


def bench_sampling(config: BenchConfig) -> Iterator[dict[str, Any] | Under]:
    """Time whole trajectories of the plain DiT and of N experts, mixed and pre-computed."""
    device = distributed.pick_device(config.device)
    sampling = SamplingConfig(
        num_images=config.batch_size, num_inference_steps=config.num_inference_steps
    )
    numbers = {"plain": (1, 1), "mixed": (config.num_bases, config.num_experts)}
    numbers["precomputed"] = numbers["mixed"]
    variants: dict[str, Step] = {}
    for name, (num_bases, num_experts) in numbers.items():
        model = build(config, num_bases, num_experts).to(device)
        model.mixture.cast_network(PRECISIONS[config.precision])
        ready = replace(sampling, precompute=name == "precomputed")
        variants[name] = trajectory_step(model, ready, config.batch_size)
    timings = {}
    for progress in take_turns(variants, config.steps, device, warmup=1):
        if isinstance(progress, Under):
            yield progress
        else:
            timings[progress.name] = progress
    plain = median(timings["plain"].seconds)
    yield {
        "config": asdict(config),
        "machine": machine(device),
        "variants": {name: timing.to_json() for name, timing in timings.items()},
        "remix_over_plain": median(timings["mixed"].seconds) / plain,
        "precomputed_over_plain": median(timings["precomputed"].seconds) / plain,
    }


def trajectory_step(model: RemixDiT, sampling: SamplingConfig, batch_size: int) -> Step:
    """Return one whole trajectory of a batch."""

    def step(index: int) -> None:
        # Another expert is active at the end than at the start, so every trajectory mixes all.
        sample_latents(model, sampling, range(batch_size))

    return step


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """A loader to time."""

    shards: str
    """A directory of shards."""
    batch_size: int = 256
    """Images a batch."""
    steps: int = 100
    """Batches that are timed, after a tenth as many that are not."""


def bench_loader(config: LoaderConfig) -> dict[str, Any]:
    """Time batches as training gets them, shuffled and made ahead in threads."""
    loader = Loader(ShardDataset(config.shards), config.batch_size)
    batches = loader.batches()
    for _ in range(1 + config.steps // 10):
        next(batches)
    seconds = []
    for _ in range(config.steps):
        started = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - started)
    timing = Timing("batch", tuple(seconds), None)
    return {
        "config": asdict(config),
        "machine": machine(torch.device("cpu")),
        "variants": {"batch": timing.to_json()},
        "latents_per_second": config.batch_size * config.steps / sum(seconds),
    }


def update_floor_seconds(config: BenchConfig, device: torch.device) -> float:
    """Return the time that mixing must add to a plain step: its bytes over the bandwidth.

    Reading and writing K instead of 1 of bases, both moments and average; reading the K bases
    once more for the inner products and once more for the mix, which writes one network.
    """
    parts = state_bytes(config)
    one = parts["bases"] / config.num_bases
    width = 2 if config.precision == "bf16" else 4
    moved = 8 * (config.num_bases - 1) * one + 2 * config.num_bases * one + one * width / 4
    return moved / bytes_per_second(device)


def state_bytes(config: BenchConfig) -> dict[str, int]:
    """Return the memory of training by part, without activations, at one expert a step."""
    model = build(config, 1, 1)  # one basis tells the sizes
    segments = model.mixture.segments
    mixed = sum(len(segment.weights) for segment in segments if segment.is_mixed)
    shared = sum(len(segment.weights) for segment in segments if not segment.is_mixed)
    width = 2 if config.precision == "bf16" else 4
    return {
        "bases": 4 * config.num_bases * mixed,
        "moments": 8 * config.num_bases * mixed + 8 * shared,
        "average": 4 * config.num_bases * mixed + 4 * shared,
        "network": width * mixed + 4 * shared,
        "gradient": width * (mixed + shared),
    }
