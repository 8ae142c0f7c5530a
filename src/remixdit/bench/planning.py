"""Which training fits a GPU, and how long it takes: computed by the formulas of `scaling`.

For each number of bases every way to save memory is tried: sharding, micro-batches, recomputing.
Of those that fit the simplest is taken whose step is at most a tenth slower than the fastest.

Shapes: K bases, N experts, M experts of a step.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from remixdit.bench.cards import GB, Card, card_of
from remixdit.bench.config import shape_named
from remixdit.bench.scaling import StepCost, outline, step_cost, step_seconds
from remixdit.diffusion.dit import SIZES, DiTConfig
from remixdit.model.loading import stated_config
from remixdit.training.config import MixtureConfig, TrainConfig
from remixdit.training.optimizer import OptimizerConfig

__all__ = ["LEFT_FREE", "Plan", "PlanConfig", "Plans", "make_plans"]

PREFERRED = (4, 2, 1)  # K: the default of training, half of it, and the plain DiT
SHOWN = (*PREFERRED, 8, 16)
LEFT_FREE = 0.1  # share of the memory for CUDA, its libraries and gaps between blocks; assumed
TOLERANCE = 1.1  # times the fastest step, for a simpler way
PIXELS = 8  # edge of what one latent stands for


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A network, and the GPUs to train it on."""

    network: str
    """Published shape, e.g. S/2 or XL/2, WIDTHxDEPTH/PATCH, or a plain DiT, e.g. a directory."""
    gpu: str
    """Memory of one GPU, e.g. 24GB, or a card, e.g. H100."""
    gpus: int = 1
    """Number of GPUs; more than 8 are machines of 8 each."""
    images: str = "100000x256"
    """Number of images to train on, e.g. 25.6e6, or as a product 1.28e6x80."""
    image_size: int = 0
    """Edge of the images in pixels, 8 for each latent; 0 for 256, or what the model has."""
    num_experts: int = 20
    """Number of experts, N, that share every step."""
    batch_size: int = 256
    """Number of images in a step, over all GPUs."""
    algorithm: str = "adamw"
    """Optimizer, adamw or muon."""
    images_per_second: float = 0.0
    """Measured speed of the recommended setting over all GPUs; 0 for the computed speed."""
    flops_share: float = 0.4
    """Share of the peak of matrix products that the network is assumed to reach."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        card_of(self.gpu)
        OptimizerConfig(algorithm=self.algorithm)
        number_of(self.images)
        if self.gpus < 1 or (self.gpus > 8 and self.gpus % 8):
            raise ValueError(f"gpus must be 1 to 8, or a multiple of 8, got {self.gpus}")
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {self.num_experts}")
        if self.batch_size < 1 or self.batch_size % self.gpus:
            raise ValueError(
                f"batch_size must be a multiple of the {self.gpus} GPUs, got {self.batch_size}"
            )
        if self.image_size < 0 or self.image_size % PIXELS:
            raise ValueError(f"image_size must be a multiple of {PIXELS}, got {self.image_size}")
        if not 0 < self.flops_share <= 1:
            raise ValueError(f"flops_share must be in (0, 1], got {self.flops_share}")
        if not 0 <= self.images_per_second < math.inf:
            raise ValueError(f"images_per_second must be at least 0, got {self.images_per_second}")


class Plan(NamedTuple):
    """A run for K bases, and what it takes."""

    run: TrainConfig
    cost: StepCost
    fits: bool
    """Whether the parts together are below the budget; if not, they are the least that K takes."""
    images_per_second: float
    """Computed speed over all GPUs."""

    @property
    def memory_bytes(self) -> int:
        """Bytes of all parts, which bound the peak."""
        return sum(self.cost.memory.values())


class Plans(NamedTuple):
    """Plans for several K, the recommended one first."""

    plans: list[Plan]
    card: Card
    budget_bytes: int
    """Bytes that a plan may take."""
    num_images: float


def make_plans(config: PlanConfig) -> Plans:
    """Return the plans for every K.

    Raises:
        ValueError: Nothing fits, or the network is unknown.
    """
    gpu = card_of(config.gpu)
    gpu = gpu._replace(rates=replace(gpu.rates, flops_share=config.flops_share))
    budget = int(gpu.memory_bytes * (1 - LEFT_FREE))
    network = network_of(config)
    shown = [k for k in SHOWN if k <= config.num_experts]
    found = {k: best_plan(config, network, k, gpu, budget) for k in shown}
    chosen = next((k for k in PREFERRED if k in found and found[k].fits), None)
    if chosen is None:
        least = min(plan.memory_bytes for plan in found.values()) / (1 - LEFT_FREE)
        raise ValueError(
            f"gpu must have at least {math.ceil(least / GB * 10) / 10:g}GB for one image at a time "
            f"of {config.network} on {config.gpus} of them, got {config.gpu}; `train --rank 16`, "
            "with adamw, takes less, which is not computed here"
        )
    order = sorted(found, key=lambda k: (k != chosen, k))
    plans = [found[k] for k in order]
    if config.images_per_second:  # others in proportion, as the formulas have it
        factor = config.images_per_second / plans[0].images_per_second
        plans = [p._replace(images_per_second=p.images_per_second * factor) for p in plans]
    return Plans(plans, gpu, budget, number_of(config.images))


def best_plan(
    config: PlanConfig, network: DiTConfig, num_bases: int, gpu: Card, budget: int
) -> Plan:
    """Return the plan for K bases, or what takes the least memory if nothing fits."""
    runs = list(ways(config, network, num_bases))
    model = outline(runs[0])  # the ways share network and mixture
    plans = []
    for run in runs:
        cost = step_cost(run, config.gpus, model)
        fits = sum(cost.memory.values()) <= budget
        seconds = step_seconds(cost, gpu.rates)["step"]
        plans.append(Plan(run, cost, fits, config.batch_size / seconds))
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=lambda plan: plan.memory_bytes)
    fastest = max(plan.images_per_second for plan in fitting)
    return next(plan for plan in fitting if plan.images_per_second * TOLERANCE >= fastest)


def ways(config: PlanConfig, network: DiTConfig, num_bases: int) -> Iterator[TrainConfig]:
    """Yield the runs to choose from, simple ones first."""
    num_experts = 1 if num_bases == 1 else config.num_experts
    run = TrainConfig(
        data="",
        output_dir=Path(),
        network=network,
        batch_size=config.batch_size,
        precision="bf16",
        mixture=MixtureConfig(num_bases=num_bases, num_experts=num_experts),
        optimizer=OptimizerConfig(algorithm=config.algorithm),
    )
    images = config.batch_size // config.gpus
    parts = (0, *(math.ceil(images / 2**i) for i in range(1, math.ceil(math.log2(images)) + 1)))
    shards = [(False, 0)]
    if config.algorithm != "muon":  # which needs whole matrices
        shards += [(True, 0)] * (config.gpus > 1) + [(True, 8)] * (config.gpus > 8)
    for (shard, size), recompute, part in product(shards, (False, True), parts):
        yield replace(run, shard=shard, shard_size=size, recompute=recompute, micro_batch_size=part)


def network_of(config: PlanConfig) -> DiTConfig:
    """Return the shape of the network."""
    edge = config.image_size // PIXELS
    if Path(config.network).is_dir():
        model = stated_config(config.network)
        if model.num_experts > 1:
            raise ValueError(
                f"network must be a plain DiT, got {config.network} of {model.num_experts} experts"
            )
        return replace(model.network, input_size=edge or model.network.input_size)
    name = config.network.upper().removeprefix("DIT-")
    if name.partition("/")[0] not in SIZES and not re.fullmatch(r"\d+X\d+/\d+", name):
        names = ", ".join(f"{size}/2" for size in SIZES)
        raise ValueError(
            f"network must be one of {names} (or with patches of 4 or 8), WIDTHxDEPTH/PATCH such "
            f"as 384x12/2, or the directory of a model, got {config.network!r}"
        )
    return shape_named(name, edge or 32)


def number_of(text: str) -> float:
    """Return the number that a text gives, such as 1.28e6, or as a product, such as 1.28e6x80."""
    try:
        number = math.prod(float(part) for part in re.split("[x*]", text))
    except ValueError:
        number = math.nan
    if not 1 <= number < math.inf:
        raise ValueError(
            f"images must be a number of at least 1 such as 25.6e6 or 1.28e6x80, got {text!r}"
        )
    return number
