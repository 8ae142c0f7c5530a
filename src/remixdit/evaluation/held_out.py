"""Figures of a run's losses on images that it was not trained on.

Training losses are noisy, and of images that the network has seen; here all experts see the same
images, timesteps and noise, so what differs is the expert alone.

Shapes: n images, N experts, I intervals.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from remixdit.data import EncodeConfig, ShardDataset, encode, is_shard_dir, open_source
from remixdit.diffusion.intervals import Intervals
from remixdit.evaluation.losses import Held, interval_losses
from remixdit.evaluation.run_figures import boundaries_of
from remixdit.figures.plots import loss_by_interval, loss_matrix
from remixdit.model.config import RemixConfig
from remixdit.model.describe import describe
from remixdit.model.model import RemixDiT

__all__ = ["expert_losses", "held_out_figures", "held_out_images", "intervals_of"]


def held_out_images(data: str, config: RemixConfig, num_images: int) -> Held:
    """Return up to so many images, spread over the data, as a model sees them.

    Args:
        data: Shards, or for a model of pixels what `open_source` takes.
        config: The model's.
        num_images: At least 2.

    Raises:
        ValueError: the data are of other latents or classes than the model's.
    """
    if num_images < 2:
        raise ValueError(f"held_out_images must be at least 2, got {num_images}")
    if is_shard_dir(Path(data)):
        return read_spread(ShardDataset(data), config, num_images)
    if config.autoencoder["name"] != "none":
        raise ValueError(
            f"held_out must be shards that `remixdit encode` wrote with "
            f"{config.autoencoder['name']}, for a model of its latents, got {data}"
        )
    source = open_source(data)
    chosen = source.subset(spread(len(source), num_images), source.name)
    pixels = EncodeConfig(image_size=config.network.input_size, channels=config.network.in_channels)
    with TemporaryDirectory() as directory:
        for _ in encode(chosen, Path(directory) / "shards", pixels):
            pass
        return read_spread(ShardDataset(Path(directory) / "shards"), config, num_images)


def read_spread(dataset: ShardDataset, config: RemixConfig, num_images: int) -> Held:
    """Read images spread over the data: those of a folder lie class by class."""
    network = config.network
    dataset.require(
        config.autoencoder, (network.in_channels, network.input_size, network.input_size)
    )
    indices = spread(len(dataset), num_images)
    latents, class_labels = dataset.read(indices, np.zeros_like(indices), seed=0)
    return Held(latents, relabelled(class_labels, dataset.class_names, config))


def spread(num_images: int, num_chosen: int) -> np.ndarray:
    """Return indices spread evenly over the data."""
    return np.linspace(0, num_images - 1, min(num_images, num_chosen)).astype(np.int64)


def relabelled(class_labels: Tensor, names: Sequence[str], config: RemixConfig) -> Tensor:
    """Return a model's labels for those of other data, which may hold some of its classes.

    Args:
        class_labels: (n,) in [0, len(names)], the last is the null label.
        names: Of the data's classes.
        config: The model's.
    """
    null = config.network.num_classes
    if not null:
        return torch.zeros_like(class_labels)
    unknown = sorted(set(names).difference(config.class_names))
    if unknown:
        raise ValueError(f"held_out must hold classes of the run, got {unknown[0]!r}")
    return torch.tensor([*map(config.class_names.index, names), null])[class_labels]


def intervals_of(run_dir: Path, model: RemixDiT) -> Intervals:
    """Return the experts' intervals, or those over which a plain DiT's timesteps were spread."""
    if model.num_experts > 1:
        return model.intervals
    return Intervals(tuple(boundaries_of(run_dir, describe(run_dir))))


def expert_losses(model: RemixDiT, held: Held, intervals: Intervals) -> Iterator[np.ndarray]:
    """Yield the (I, n) losses on every interval, expert by expert."""
    for expert in range(model.num_experts):
        yield interval_losses(model, held, intervals, experts=[expert])[0]


def held_out_figures(losses: np.ndarray, intervals: Intervals) -> Iterator[tuple[str, Figure]]:
    """Yield the (name, figure) of what was measured.

    Args:
        losses: (N, I, n) of every expert; I = N if there are several.
        intervals: I of them.
    """
    several = len(losses) > 1
    owned = np.einsum("iin->in", losses) if several else losses[0]  # (I, n)
    errors = owned.std(-1, ddof=1) / owned.shape[-1] ** 0.5
    yield (
        "held-out-loss-by-interval",
        loss_by_interval({"held out": owned.mean(-1)}, intervals.boundaries, {"held out": errors}),
    )
    if several:
        yield "loss-matrix", loss_matrix(losses.mean(-1), intervals.boundaries)
