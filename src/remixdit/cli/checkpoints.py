"""Models, as the command line names and opens them."""

from pathlib import Path

import torch

from remixdit.cli.terminal import say
from remixdit.data import is_shard_dir
from remixdit.data.autoencoder import Autoencoder, LatentAutoencoder, load_autoencoder
from remixdit.model.loading import find_model, load_model
from remixdit.model.model import RemixDiT
from remixdit.training.config import PRECISIONS

__all__ = [
    "check_precision",
    "names_model",
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


def is_hub_name(path: str) -> bool:
    """Whether something that does not exist may be a model of the hub, owner/name."""
    found = Path(path)
    if found.exists() or found.is_absolute() or found.suffix:
        return False
    return len(found.parts) == 2 and not found.parent.exists()


def open_model(path: str, *, ema: bool, precision: str, device: torch.device) -> RemixDiT:
    """Load a model to a device, in its precision."""
    if not Path(path).exists() and not is_hub_name(path):  # nothing to wait for the network for
        raise ValueError(f"{path}: no such model, nor owner/name on the hub")
    model = load_model(newest_weights(path, ema), ema=ema, device=str(device))
    model.sample_with(PRECISIONS[precision])
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
    if found.step is not None:
        say(f"{path}: {kind} of step {found.step:,}")
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
