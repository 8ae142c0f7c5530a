"""What a training step costs on any number of processes, before anyone runs it.

The model is built on torch's meta device, where a tensor has a shape and no storage, and its
parameters are counted. Operations and activations are formulas (`costs`), and so are the seconds,
from what a machine is said to do:

    step = operations / rate + bytes of the passes / bandwidth + bytes sent / bandwidth of a link

without overlap. Bytes are those of one process.

Shapes: K bases, M experts of a step, R processes in groups of G that share one copy of the state.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from remixdit.bench.counting import Counted, counted, mixed_at_once, mixed_per_step
from remixdit.diffusion.costs import activation_bytes, block_activation_bytes, training_flops
from remixdit.model.config import RemixConfig
from remixdit.model.model import RemixDiT
from remixdit.training.config import PRECISIONS, TrainConfig
from remixdit.training.muon import orthogonal_flops

__all__ = ["H100", "Hardware", "StepCost", "outline", "step_cost", "step_seconds"]

FLOAT = 4  # bytes of a number: parameters, moments, averages and gradients are float32


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What each process has, in operations and bytes a second."""

    flops_per_second: float
    """Peak of matrix products in the run's precision."""
    flops_share: float
    """Share of that peak that a network is assumed to reach."""
    memory_bandwidth: float
    """Bandwidth of the accelerator's memory, reads and writes together."""
    link_bandwidth: float
    """Bandwidth of a process to others of the same machine, in one direction."""
    network_bandwidth: float
    """Bandwidth of a process to other machines while all processes send, in one direction."""
    per_machine: int = 8
    """Processes of a machine."""


# From its data sheet: dense bfloat16, HBM3, NVLink in one direction; a 400 Gb/s card for each GPU.
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
    """G: processes that share one copy of the state; 1 if each holds all of it (DDP)."""
    images: int
    """Images that this process runs."""
    flops: int
    """Operations of the network, forward and backward; mixing is counted in `moved`."""
    orthogonal_flops: int
    """Operations by which Muon makes this process's share of the matrices orthogonal."""
    memory: dict[str, int]
    """Bytes by part; their sum bounds the peak, as not all of them are there at once."""
    moved: dict[str, int]
    """Bytes read and written by mixing and by the passes over parameters and gradients."""
    reduced_bytes: int
    """Bytes of gradients reduced; `reduced_bytes` of metrics.jsonl."""
    across_bytes: int
    """Bytes of gradient slices that the groups then reduce among each other (HSDP)."""
    moves_bytes: int
    """Bytes of matrices that Muon made orthogonal, gathered from several processes."""
    gathered_bytes: int
    """Bytes of parameters gathered, forward and again backward (FSDP2)."""
    backward_passes: int = 1
    """Micro-batches of a step; FSDP2 gathers and reduces in each of them."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        totals = {"memory_bytes": sum(self.memory.values()), "moved_bytes": self.moved_bytes}
        return {**asdict(self), **totals}

    @property
    def moved_bytes(self) -> int:
        """Bytes of all passes."""
        return sum(self.moved.values())


def step_cost(config: TrainConfig, num_ranks: int = 1, model: RemixDiT | None = None) -> StepCost:
    """Return what one of R processes spends in a step of a run.

    Args:
        config: The run; its network is taken as it stands, whatever the data are.
        num_ranks: R; divides batch_size.
        model: `outline` of this run, or of another with the same network and mixture.
    """
    size = group_size(config, num_ranks)
    images = config.batch_size // num_ranks
    model = outline(config) if model is None else model
    parameters = counted(model, size, PRECISIONS[config.precision])
    trained = [p for p in parameters if p.is_trained]
    reduced = FLOAT * sum(p.numbers for p in trained) if num_ranks > 1 else 0
    own = FLOAT * sum(p.own for p in trained)
    batches = mixed_per_step(config, images)
    matrices = matrices_by_shape(config, parameters)
    return StepCost(
        num_ranks=num_ranks,
        group_size=size,
        images=images,
        flops=training_flops(config.network, images) * (4 if config.recompute else 3) // 3,
        memory=memory(config, model, parameters, numbers_of(matrices), size, images)
        | {"orthogonal": orthogonal_bytes(config, matrices, num_ranks)},
        moved=moved(config, parameters, batches, size)
        | {"muon": muon_bytes(config, matrices, num_ranks)},
        orthogonal_flops=sum(
            share_of(count, num_ranks) * orthogonal_flops(shape)
            for shape, count in matrices.items()
        ),
        reduced_bytes=reduced,
        across_bytes=own if 1 < size < num_ranks else 0,
        moves_bytes=moves_bytes(config, matrices, num_ranks),
        gathered_bytes=gathered_bytes(parameters) if size > 1 else 0,
        backward_passes=len(batches),
    )


def group_size(config: TrainConfig, num_ranks: int) -> int:
    """Return G, after checking that the run can be divided among R processes."""
    if config.batch_size % num_ranks:
        raise ValueError(
            f"batch_size must be a multiple of the {num_ranks} processes, got {config.batch_size}"
        )
    size = (config.shard_size or num_ranks) if config.shard else 1
    if num_ranks % size:
        raise ValueError(f"shard_size must divide the {num_ranks} processes, got {size}")
    return size


def outline(config: TrainConfig) -> RemixDiT:
    """Return the model of a run, without storage."""
    mixture = config.mixture
    return RemixDiT.empty(
        RemixConfig(
            network=config.network,
            num_bases=mixture.num_bases,
            num_experts=mixture.num_experts,
            mixed=mixture.mixed,
            coefficients=mixture.coefficients,
            per_block=mixture.per_block,
            rank=mixture.rank,
        )
    )


# --- memory


def memory(
    config: TrainConfig,
    model: RemixDiT,
    parameters: list[Counted],
    moved_by_muon: int,
    size: int,
    images: int,
) -> dict[str, int]:
    """Return the bytes of memory of one process, by part.

    Args:
        config: The run.
        model: Its outline.
        parameters: All of them.
        moved_by_muon: Numbers of the matrices that Muon moves.
        size: G.
        images: Images that this process runs.
    """
    dtype = PRECISIONS[config.precision]
    trained = [p for p in parameters if p.is_trained]
    own = FLOAT * sum(p.own for p in parameters)
    buffers = sum(buffer.nbytes for buffer in model.network.buffers())
    gradients = FLOAT * sum(p.own for p in trained)
    at_once = min(config.micro_batch_size or images, images)
    width = dtype.itemsize
    activations = activation_bytes(config.network, width, config.recompute)
    if config.recompute:
        activations += block_activation_bytes(config.network, width)
    return {
        "parameters": own + buffers,
        # AdamW counts the steps of each; of matrices Muon has the first moment alone.
        "moments": 2 * gradients + FLOAT * (len(trained) - moved_by_muon),
        "average": gradients,
        "gradients": gradients,
        "gathered": gathered_at_once(parameters) if size > 1 else 0,
        "mixed": mixed_at_once(model, config, images),
        "autocast": width * sum(p.numbers for p in parameters if p.is_cast),
        "activations": at_once * activations,
    }


def gathered_at_once(parameters: list[Counted]) -> int:
    """Return the bytes of whole parameters and gradients that FSDP2 holds at once, at most.

    Those of one block and, as FSDP2 gathers them once a step, of all that is outside the blocks.
    """
    by_block: dict[int, int] = {}
    for p in parameters:
        by_block[p.block] = by_block.get(p.block, 0) + p.numbers * (1 + p.is_trained)
    root = by_block.pop(-1, 0)
    return FLOAT * (root + max(by_block.values(), default=0))


def matrices_by_shape(config: TrainConfig, parameters: list[Counted]) -> dict[tuple[int, int], int]:
    """Return how many matrices Muon moves, by their shape (O, I); none with AdamW."""
    found: dict[tuple[int, int], int] = {}
    for p in parameters:
        if config.optimizer.algorithm == "muon" and p.is_trained and p.matrix:
            rows, columns = p.matrix
            found[p.matrix] = found.get(p.matrix, 0) + p.numbers // (rows * columns)
    return found


def numbers_of(matrices: dict[tuple[int, int], int]) -> int:
    """Return the numbers of all matrices."""
    return sum(count * rows * columns for (rows, columns), count in matrices.items())


def share_of(count: int, num_ranks: int) -> int:
    """Return how many of the matrices of one shape each process makes orthogonal."""
    return -(-count // num_ranks)


def orthogonal_bytes(
    config: TrainConfig, matrices: dict[tuple[int, int], int], num_ranks: int
) -> int:
    """Return the bytes of what Muon holds of the matrices of one shape at once, at most.

    Their directions, one by one and joined, and their moves; of this process's share, what an
    iteration reads and writes.
    """
    width = PRECISIONS[config.precision].itemsize
    largest = 0
    for (rows, columns), count in matrices.items():
        share = share_of(count, num_ranks)
        square = min(rows, columns) ** 2
        own = 2 * rows * columns + 2 * square
        largest = max(largest, 3 * share * num_ranks * rows * columns + share * own)
    return width * largest


# --- traffic


def moves_bytes(config: TrainConfig, matrices: dict[tuple[int, int], int], num_ranks: int) -> int:
    """Return the bytes of the orthogonal matrices that each process gathers: equal shares."""
    if num_ranks == 1:
        return 0
    every = {shape: num_ranks * share_of(count, num_ranks) for shape, count in matrices.items()}
    return PRECISIONS[config.precision].itemsize * numbers_of(every)


def muon_bytes(config: TrainConfig, matrices: dict[tuple[int, int], int], num_ranks: int) -> int:
    """Return the bytes that Muon reads and writes beyond what `update` counts for AdamW.

    Passes over all matrices in float32: the choice of a skipped step (3), two lerps (6), a rounding
    (1), the update (6); in the precision of the arithmetic: roundings, joining, filling (6); over
    this process's share: the scaling (3) and five iterations of 5.
    """
    width = PRECISIONS[config.precision].itemsize
    shares = {shape: share_of(count, num_ranks) for shape, count in matrices.items()}
    whole, own = numbers_of(matrices), numbers_of(shares)
    return whole * (16 * FLOAT + 6 * width - 7 * FLOAT) + own * (5 * 5 + 3) * width


def gathered_bytes(parameters: list[Counted]) -> int:
    """Return the bytes of parameters that FSDP2 gathers: blocks twice, the rest once."""
    return FLOAT * sum(p.numbers * (1 if p.block < 0 else 2) for p in parameters)


def moved(
    config: TrainConfig, parameters: list[Counted], batches: list[int], size: int
) -> dict[str, int]:
    """Return the bytes that a step reads and writes, by pass.

    Args:
        config: The run.
        parameters: All of them.
        batches: How many experts each micro-batch holds.
        size: G.
    """
    width = PRECISIONS[config.precision].itemsize
    bases = sum(p.numbers for p in parameters if p.is_mixed)
    expert = bases // config.mixture.num_bases
    plain = sum(p.numbers for p in parameters if p.is_trained and not p.is_mixed)
    cast = sum(p.numbers for p in parameters if p.is_cast)
    own = FLOAT * sum(p.own for p in parameters if p.is_trained)
    runs = 3 if config.recompute else 2  # forward, perhaps again, and in the backward pass
    rounds = {
        "mixing": runs * sum(mixing_bytes(bases, expert, count, width) for count in batches),
        "folding": sum(folding_bytes(bases, expert, count, width) for count in batches),
        "shared gradients": len(batches) * (FLOAT * plain + 2 * width * cast),
        "casts": len(batches) * (FLOAT + width) * cast,
        # From the second micro-batch on gradients are added: two read, one written.
        "accumulation": 3 * (len(batches) - 1) * FLOAT * (bases + plain),
        # Read for the norm; zeros in place of what is not finite (4); scaled (2).
        "clipping": 7 * own,
        "update": 7 * own,  # gradient read; parameter and two moments read and written
        "average": 3 * own,
    }
    if size > 1:  # each gather is copied out of its buffer, each gradient into one
        copies = 2 * gathered_bytes(parameters) + 2 * FLOAT * (bases + plain)
        rounds["gathering"] = len(batches) * copies
    return rounds


def mixing_bytes(bases: int, expert: int, count: int, width: int) -> int:
    """Return the bytes moved to mix so many experts once: a product in float32, then a cast."""
    cast = FLOAT + width if width != FLOAT else 0
    return FLOAT * bases + count * expert * (FLOAT + cast)


def folding_bytes(bases: int, expert: int, count: int, width: int) -> int:
    """Return the bytes moved to make gradients of bases and coefficients of those of experts."""
    cast = FLOAT + width if width != FLOAT else 0
    joined = 3 * width  # written by the product, then read and written to lie together
    return count * expert * (joined + cast + 2 * FLOAT) + 2 * FLOAT * bases


# --- seconds


def step_seconds(cost: StepCost, hardware: Hardware) -> dict[str, float]:
    """Return the seconds of a step by part, and of all, on a machine as described."""
    rate = hardware.flops_per_second * hardware.flops_share
    parts = {
        "network": cost.flops / rate,
        "orthogonal": cost.orthogonal_flops / rate,
        "passes": cost.moved_bytes / hardware.memory_bandwidth,
        "communication": sum(communication_seconds(cost, hardware)),
    }
    return {**parts, "step": sum(parts.values())}


def communication_seconds(cost: StepCost, hardware: Hardware) -> Iterator[float]:
    """Yield the times to send what a step sends around rings, at full bandwidth.

    Of R processes, reducing for all sends 2 (R - 1) / R of the bytes, a reduce-scatter or an
    all-gather half of it. A ring over several machines is as fast as its slowest link.
    """

    def seconds(sent: float, ranks: int, span: int) -> float:
        inside = span <= hardware.per_machine
        link = hardware.link_bandwidth if inside else hardware.network_bandwidth
        return sent * (ranks - 1) / ranks / link

    if cost.group_size == 1:
        yield seconds(2 * cost.reduced_bytes, cost.num_ranks, cost.num_ranks)
        yield seconds(cost.moves_bytes, cost.num_ranks, cost.num_ranks)
        return
    times, copies = cost.backward_passes, cost.num_ranks // cost.group_size
    inside = times * (cost.reduced_bytes + cost.gathered_bytes)
    yield seconds(inside, cost.group_size, cost.group_size)
    yield seconds(2 * times * cost.across_bytes, copies, cost.num_ranks)
