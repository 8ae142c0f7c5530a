"""What a training step costs on any number of processes, before anyone runs it.

Memory and traffic are not formulas. The model is built on torch's meta device, where a tensor has
a shape and no storage, as slices of so many processes, and takes in the gradients of one step: its
arrays are those of a real run, counted. Operations and activations are formulas (`costs`), and so
are the seconds, from what a machine is said to do:

    step = operations / rate + bytes of the passes / bandwidth + bytes sent / bandwidth of a link

without overlap, as the loop runs today. Bytes are those of one process.

Shapes: K bases, M experts of a step, P numbers of a segment, R processes in groups of G.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from remixdit.diffusion.costs import activation_bytes, block_activation_bytes, training_flops
from remixdit.diffusion.dit import DiT
from remixdit.first.mixing import Mixture
from remixdit.first.optim import MixtureAdamW
from remixdit.first.segments import Segment
from remixdit.first.sharding import Shard
from remixdit.first.stacking import ExpertStack, stacks
from remixdit.first.step_gradients import StepGradients
from remixdit.training.config import PRECISIONS, TrainConfig

__all__ = ["H100", "Hardware", "StepCost", "step_cost", "step_seconds"]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What each process has, in operations and bytes a second."""

    flops_per_second: float
    """Peak of matrix products in the run's precision."""
    flops_share: float
    """What a network is taken to reach of it."""
    memory_bandwidth: float
    """Of the accelerator's memory, read and written together."""
    link_bandwidth: float
    """That a process sends with inside a machine."""
    network_bandwidth: float
    """That a process sends with to other machines, when all do."""
    per_machine: int = 8
    """Processes of a machine."""


# Of its data sheet: dense bfloat16, HBM3, NVLink in one direction; a 400 Gb/s card for each GPU.
# The share is an assumption.
H100 = Hardware(
    flops_per_second=989e12,
    flops_share=0.4,
    memory_bandwidth=3.35e12,
    link_bandwidth=450e9,
    network_bandwidth=50e9,
)


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one process spends in a step."""

    num_ranks: int
    """R."""
    group_size: int
    """G: processes that share one copy of the bases out; 1 if each holds all."""
    images: int
    """That it runs."""
    flops: int
    """Operations of the network, forward and back."""
    memory: dict[str, int]
    """Bytes at the peak, by part."""
    moved: dict[str, int]
    """Bytes read and written by the passes over bases and gradients."""
    reduced_bytes: int
    """Of gradients handed over; `reduced_bytes` of metrics.jsonl."""
    across_bytes: int
    """Of these, between groups."""
    gathered_bytes: int
    """Of mixed weights that are completed, with sharding."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        totals = {"memory_bytes": sum(self.memory.values()), "moved_bytes": self.moved_bytes}
        return {**asdict(self), **totals}

    @property
    def moved_bytes(self) -> int:
        """Of all passes."""
        return sum(self.moved.values())


class Rehearsal(Shard):
    """A slice among processes that are not there: what would be sent is counted."""

    def __init__(self, size: int, has_copies: bool) -> None:
        super().__init__(0, size)
        self.has_copies, self.across_bytes = has_copies, 0

    def gather(self, own: Tensor, out: Tensor) -> None:
        """Send nothing."""

    def sum_own(self, grads: Tensor) -> Tensor:
        """Return what a slice of the sum would be stored in."""
        sums = grads.new_empty(*grads.shape[:-1], grads.shape[-1] // self.num_ranks)
        self.across_bytes += sums.nbytes * self.has_copies
        self.reduced_bytes += grads.nbytes + sums.nbytes * self.has_copies
        return sums


def step_cost(config: TrainConfig, num_ranks: int = 1) -> StepCost:
    """Return what one of R processes spends in a step of a run.

    Args:
        config: The run; its network is taken as it stands, whatever the data are.
        num_ranks: R; divides batch_size.
    """
    if config.batch_size % num_ranks:
        raise ValueError(
            f"batch_size must be a multiple of the {num_ranks} processes, got {config.batch_size}"
        )
    size = (config.shard_size or num_ranks) if config.shard else 1
    if num_ranks % size:
        raise ValueError(f"shard_size must divide the {num_ranks} processes, got {size}")
    experts = config.strata_per_step if config.mixture.num_experts > 1 else 1
    images = config.batch_size // num_ranks
    sharding = Rehearsal(size, size < num_ranks) if size > 1 else None
    mixture = mixture_of(config, sharding)
    optimizer = MixtureAdamW(mixture, config.optimizer, compile=False)
    mixture.cast_network(PRECISIONS[config.precision])
    stacked = not config.takes_turns and stacks(mixture, experts)
    kept = kept_bytes(mixture, optimizer)
    at_once = images if stacked else -(-images // experts)
    passes = 1 if stacked else -(-at_once // (config.micro_batch_size or at_once))
    at_once = -(-at_once // passes)
    kept |= gradient_bytes(optimizer.gradients, experts, passes, stacked)
    moved = moved_bytes(mixture, experts, passes, stacked)
    reduced = sharding.reduced_bytes if sharding is not None else 0
    if sharding is None and num_ranks > 1:
        reduced = sum(values.nbytes for values in optimizer.gradients.to_reduce())
    return StepCost(
        num_ranks=num_ranks,
        group_size=size,
        images=images,
        flops=training_flops(config.network, images) * (4 if config.recompute else 3) // 3,
        memory={**kept, "activations": at_once * peak_activation_bytes(config)},
        moved=moved,
        reduced_bytes=reduced,
        across_bytes=sharding.across_bytes if sharding is not None else 0,
        gathered_bytes=gathered_bytes(mixture, experts) if sharding is not None else 0,
    )


def mixture_of(config: TrainConfig, sharding: Shard | None) -> Mixture:
    """Return the mixture of a run, without storage."""
    with torch.device("meta"):
        network = DiT(config.network)
    options = config.mixture
    mixture = Mixture(
        network,
        options.num_bases,
        options.num_experts,
        mixed=options.mixed,
        coefficients=options.coefficients,
        per_block=options.per_block,
    )
    if sharding is not None:
        mixture.shard(sharding)
    return mixture


def kept_bytes(mixture: Mixture, optimizer: MixtureAdamW) -> dict[str, int]:
    """Return the memory that a run keeps from step to step, by part."""
    bases = {storage_of(s.bases): s.bases for s in mixture.segments}
    # In float32 the network's parameters that are not mixed are their own bases.
    weights = [s.weights for s in mixture.segments if storage_of(s.weights) not in bases]
    return {
        "bases": stored(bases.values()) + mixture.logits.nbytes,
        "moments": stored(optimizer.exp_avg) + stored(optimizer.exp_avg_sq),
        "average": stored(optimizer.ema),
        "network": stored([*weights, *mixture.network.buffers()]),
    }


def gradient_bytes(
    gradients: StepGradients, experts: int, passes: int, stacked: bool
) -> dict[str, int]:
    """Let the gradients of a step be taken in; return the memory of that."""
    mixture = gradients.mixture
    if stacked:
        stack = ExpertStack(gradients, experts)
        stack.begin_step(range(experts))
        grads = arrays_of_grads(mixture)
        gradients.slice_grads()
        grads |= arrays_of_grads(mixture)
        leaves = {storage_of(leaf): leaf for leaves in stack.leaves for leaf in leaves}
        return {"gradients": stored(grads.values()), "stack": stored(leaves.values())}
    gradients.begin_step(experts, passes)
    for expert in range(experts):
        gradients.begin_expert(expert)
        for _ in range(passes):
            gradients.collect()
    gradients.slice_grads()
    return {"gradients": stored(arrays_of_grads(mixture).values()), "stack": 0}


def arrays_of_grads(mixture: Mixture) -> dict[int, Tensor]:
    """Return what holds gradients now, by storage."""
    arrays = [a for s in mixture.segments for a in (s.grads, s.scratch) if a is not None]
    return {storage_of(values): values for values in arrays}


def peak_activation_bytes(config: TrainConfig) -> int:
    """Return the activations of one image that are there when back-propagation begins."""
    width = PRECISIONS[config.precision].itemsize
    kept = activation_bytes(config.network, width, config.recompute)
    return kept + block_activation_bytes(config.network, width) * config.recompute


def moved_bytes(mixture: Mixture, experts: int, passes: int, stacked: bool) -> dict[str, int]:
    """Return the bytes that a step's passes over bases and gradients read and write."""
    moved = dict.fromkeys(("gradients", "norm", "inner products", "update", "mix"), 0)
    for segment in mixture.segments:
        assert segment.grads is not None
        bases, grads = segment.bases.nbytes, segment.grads.nbytes
        own = segment.weights.nbytes // (mixture.sharding.num_ranks if mixture.sharding else 1)
        count = experts if segment.is_mixed else 1
        folded = len(segment.grads) != count
        if stacked and segment.is_mixed:
            # Plain ones written and read; what is kept of them written, by the bases if folded.
            plain = experts * segment.weights.nbytes
            moved["gradients"] += 2 * plain + (grads + bases if folded else plain)
        else:
            moved["gradients"] += grads + taken_in(segment, experts * passes, folded)
        moved["norm"] += grads
        if segment.is_mixed and not folded and mixture.learns_coefficients:
            moved["inner products"] += bases + grads
        updated = bases
        if segment.is_mixed and mixture.kind == "one_hot":
            updated = bases * min(experts, segment.num_bases) // segment.num_bases
        moved["update"] += 8 * updated + grads  # bases, both moments, average: read and written
        if not segment.constant:
            moved["mix"] += (1 if stacked else experts) * bases + experts * own
            if stacked and mixture.sharding is not None:  # completed row by row, then copied
                moved["mix"] += experts * (own + 3 * segment.weights.nbytes)
        elif storage_of(segment.weights) != storage_of(segment.bases):
            moved["mix"] += bases + own
    return moved


def taken_in(segment: Segment, passes: int, folded: bool) -> int:
    """Return the bytes that it takes to add the gradients of so many backward passes up."""
    if segment.scratch is None:
        return 0  # back-propagation writes to where they stay
    copied = segment.bases.nbytes // segment.num_bases  # in float32, written and read
    added = 3 * segment.bases.nbytes if folded else 2 * copied
    return passes * (2 * segment.scratch.nbytes + 2 * copied + added)


def gathered_bytes(mixture: Mixture, experts: int) -> int:
    """Return the bytes of weights that are completed from slices in a step."""
    return sum(
        segment.weights.nbytes * (1 if segment.constant else experts)
        for segment in mixture.segments
    )


def storage_of(values: Tensor) -> int:
    """Return what tells a storage from others."""
    return values.untyped_storage()._cdata


def stored(arrays: Iterable[Tensor]) -> int:
    """Return the bytes of storage behind some arrays."""
    return sum(values.untyped_storage().nbytes() for values in arrays)


def step_seconds(cost: StepCost, hardware: Hardware) -> dict[str, float]:
    """Return the seconds of a step by part, and of all, on a machine as described."""
    parts = {
        "network": cost.flops / (hardware.flops_per_second * hardware.flops_share),
        "passes": cost.moved_bytes / hardware.memory_bandwidth,
        "communication": communication_seconds(cost, hardware),
    }
    return {**parts, "step": sum(parts.values())}


def communication_seconds(cost: StepCost, hardware: Hardware) -> float:
    """Return the time to send what a step sends around rings, at full bandwidth.

    Of R processes, summing for all sends 2 (R - 1) / R of the bytes, a scattered sum or a gather
    half of it. A ring over several machines is as fast as its slowest link.
    """

    def seconds(sent: float, ranks: int, span: int) -> float:
        inside = span <= hardware.per_machine
        link = hardware.link_bandwidth if inside else hardware.network_bandwidth
        return sent * (ranks - 1) / ranks / link

    if cost.group_size == 1:
        return seconds(2 * cost.reduced_bytes, cost.num_ranks, cost.num_ranks)
    inside = cost.reduced_bytes - cost.across_bytes + cost.gathered_bytes
    copies = cost.num_ranks // cost.group_size
    return seconds(inside, cost.group_size, cost.group_size) + seconds(
        2 * cost.across_bytes, copies, cost.num_ranks
    )
