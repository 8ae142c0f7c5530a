"""Training steps to time, each a function of its number.

Ours and plain are steps of `Training`, the very object that `remixdit train` runs; only its data
are missing, as a benchmark makes its own.

Shapes: K bases, N experts, M experts of a step.
"""

from collections.abc import Callable
from functools import partial

import torch

from remixdit import distributed
from remixdit.bench.config import BenchConfig, runs_of, setting
from remixdit.bench.naive import NaiveMixture, NaiveUpdate, naive_gradients
from remixdit.bench.timing import Step
from remixdit.data import Batch, ShardDataset
from remixdit.data.autoencoder import Pixels
from remixdit.diffusion.dit import DiT
from remixdit.distributed import Ranks
from remixdit.model.config import noise_process
from remixdit.seeds import generator_for
from remixdit.training.config import PRECISIONS, TrainConfig
from remixdit.training.plan import Inputs, Planner
from remixdit.training.start import Outline, settled, starting_model, target_config
from remixdit.training.strata import training_strata
from remixdit.training.trainer import Training, compile_blocks

__all__ = ["Builder", "inputs_of", "naive_step", "our_step", "training_of", "training_variants"]

Builder = Callable[[], Step]

NUM_INPUTS = 4  # made before the clock starts, as the loader's thread makes them in a run


class NoImages(ShardDataset):
    """Stands where a run has its shards; nothing is read from it."""

    def __init__(self) -> None:
        """Open nothing."""

    def check_mirror(self, mirror: bool) -> None:
        """Allow both."""


def training_variants(config: BenchConfig) -> dict[str, Builder]:
    """Return what builds each variant: plain, then ours and the naive one for every M."""
    runs = runs_of(config)
    variants: dict[str, Builder] = {name: partial(our_step, run) for name, run in runs.items()}
    if config.naive:
        for count in config.counts():
            name = setting(count)
            variants[f"naive {name}"] = partial(naive_step, runs[f"remix {name}"])
    return variants


def our_step(run: TrainConfig) -> Step:
    """Return a training step of a run."""
    training = training_of(run)
    prepared = inputs_of(training.planner, run, training.device)

    def step(index: int) -> None:
        training.take_step(prepared[index % NUM_INPUTS])

    return step


def naive_step(run: TrainConfig) -> Step:
    """Return a training step of the naive reference, under the settings of a run of ours."""
    device, run = distributed.pick_device(run.device), settled(run, None)
    model = target_config(run, outline(run), None)
    network = DiT(model.network, run.seed).to(device)
    network.recompute = run.recompute
    mixture = NaiveMixture(network, model.num_bases, model.num_experts)
    if run.compile:
        compile_blocks(network)
    update, process = NaiveUpdate(mixture), noise_process(model)
    planner = Planner(
        training_strata(model, run),
        run.strata_per_step,
        run.batch_size,
        run.seed,
        model.network.num_classes,
        run.objective.label_dropout,
    )
    prepared = inputs_of(planner, run, device)

    def step(index: int) -> None:
        inputs = prepared[index % NUM_INPUTS]
        precision = PRECISIONS[run.precision]
        naive_gradients(mixture, process, inputs, run.micro_batch_size, precision)
        update.take()

    return step


def training_of(run: TrainConfig) -> Training:
    """Return a run in progress that needs no files."""
    start = starting_model(run, outline(run))
    return Training(run, start, NoImages(), Ranks())


def outline(run: TrainConfig) -> Outline:
    """Return what a model would have to know of the data."""
    network = run.network
    names = tuple(str(label) for label in range(network.num_classes))
    return Outline(
        (network.in_channels, network.input_size, network.input_size), names, Pixels.spec
    )


def inputs_of(planner: Planner, run: TrainConfig, device: torch.device) -> list[Inputs]:
    """Return the inputs of a few steps, on images of noise."""
    network, generator = run.network, generator_for(run.seed, "bench")
    count = run.batch_size
    shape = (count, network.in_channels, network.input_size, network.input_size)
    latents = torch.randn(shape, generator=generator)
    labels = torch.randint(max(1, network.num_classes), (count,), generator=generator)
    batch = Batch(latents, labels, torch.arange(count))
    made = [planner.inputs(step, batch) for step in range(NUM_INPUTS)]
    return [inputs.pinned() for inputs in made] if device.type == "cuda" else made
