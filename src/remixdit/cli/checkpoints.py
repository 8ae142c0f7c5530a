"""Models, as the command line names and opens them."""

from pathlib import Path

import torch

from remixdit import distributed
from remixdit.cli.terminal import say
from remixdit.data import is_shard_dir
from remixdit.data.autoencoder import Autoencoder, LatentAutoencoder, load_autoencoder
from remixdit.images.hub import is_hub_name
from remixdit.model.loading import find_model, load_model, read_while_training
from remixdit.model.model import RemixDiT
from remixdit.training.config import PRECISIONS

__all__ = [
    "check_precision",
    "load_newest",
    "names_model",
    "newest_start",
    "newest_weights",
    "open_autoencoder",
    "open_model",
]

MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "state.json",
    "metrics.jsonl",
    "model_index.json",
)


def names_model(path: str) -> bool:
    """Whether a path, or a name of the hub, is that of a model rather than of images."""
    found = Path(path)
    if found.is_dir():
        return not is_shard_dir(found) and any((found / name).is_file() for name in MODEL_FILES)
    return is_hub_name(path)


def open_model(path: str, *, ema: bool, precision: str, device: torch.device) -> RemixDiT:
    """Load a model to a device, in its precision."""
    if not Path(path).exists() and not is_hub_name(path):  # nothing to wait for the network for
        raise ValueError(f"{path}: no such model, nor owner/name on the hub")
    model = load_newest(path, ema, device)
    model.sample_with(PRECISIONS[precision])
    return model


def newest_start(path: str) -> None:
    """Say which step of a run `--from` starts with; refuse what cannot be a model by that flag."""
    try:
        newest_weights(path)
    except ValueError as error:
        raise ValueError(f"--from: {error}") from error
    if not Path(path).is_dir() and not is_hub_name(path):
        raise ValueError(f"--from must be a model directory, a run or owner/name, got {path}")


def load_newest(path: str, ema: bool, device: torch.device) -> RemixDiT:
    """Load the newest weights to a device, and say which step they are of.

    Several processes join: a run that trains on may save while they look for its newest weights.
    """

    def load() -> tuple[str, RemixDiT]:
        place = newest_weights(path, ema)
        return place, load_model(place, ema=ema, device=str(device))

    place, model = read_while_training(path, load)
    distributed.start(device)
    distributed.agree({"weights": place})
    return model


def newest_weights(path: str, ema: bool = True) -> str:
    """Return the place of a run's newest weights, and say which step they are of.

    Args:
        path: A run; a model, which has no step, is returned as it is.
        ema: Whether to take averaged weights rather than the last ones.
    """
    found = find_model(Path(path), ema)
    if found is None:
        return path
    kind = "averaged weights" if ema else "weights"
    step = found.step
    if step is not None:
        say(f"{path}: {kind} of step {step:,}")
    elif found.directory != Path(path):
        say(f"{path}: {kind} of the finished model, as there is no checkpoint")
    return str(found.directory)


def open_autoencoder(model: RemixDiT, device: torch.device) -> Autoencoder:
    """Load the autoencoder that turns a model's latents into images, to a device."""
    autoencoder = load_autoencoder(model.config.autoencoder)
    if isinstance(autoencoder, LatentAutoencoder):
        return autoencoder.to(device)
    if not model.config.draws_images:
        raise ValueError(
            f"autoencoder must be known for a model of {model.config.network.in_channels} "
            "channels, got none: import it again with --autoencoder"
        )
    return autoencoder


def check_precision(precision: str) -> None:
    """Refuse an unknown precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be fp32 or bf16, got {precision!r}")
