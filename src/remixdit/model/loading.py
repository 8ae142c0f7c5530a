"""Finding and loading a checkpoint: a model directory, a run, or a model of the hub."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from remixdit.model.config import RemixConfig, read_config
from remixdit.model.diffusers_dit import diffusers_config, is_diffusers, load_diffusers
from remixdit.model.hub import download
from remixdit.model.model import RemixDiT
from remixdit.model.state import STATE_FILE, check_whole, read_state
from remixdit.model.validation import brief

__all__ = [
    "DIFFUSERS",
    "Found",
    "checkpoints",
    "damage_named",
    "find_model",
    "load_model",
    "located",
    "model_config",
    "newest_checkpoint",
    "read_while_training",
    "stated_config",
    "steps_done",
]

Result = TypeVar("Result")

DIFFUSERS = ""  # in place of a file's name: diffusers may have cut the weights into several


@dataclass(frozen=True)
class Found:
    """Directory and file of a model's weights."""

    directory: Path
    weights: str
    """Name of the file in the directory."""

    @property
    def step(self) -> int | None:
        """Number of optimizer steps done, None for a model, which does not state it."""
        if not (self.directory / STATE_FILE).is_file():
            if not self.directory.exists():  # by a run that trains on
                raise ValueError(f"model must be there, got {self.directory}: it was removed")
            return None
        with damage_named(self.directory):
            return read_state(self.directory).step


def steps_done(checkpoint: Path) -> int:
    """Return the number of steps in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest whole checkpoint of a run."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def load_model(path: str | Path, *, ema: bool = True, device: str = "cpu") -> RemixDiT:
    """Load a checkpoint.

    Args:
        path: A model directory, a checkpoint, a run (its newest checkpoint, else its finished
            model), a DiT or a pipeline that diffusers saved, or a model of the Hugging Face hub.
        ema: Whether to take the averaged weights of a checkpoint rather than its last ones.
        device: Device of the weights.
    """

    def load() -> RemixDiT:
        found = located(path, ema)
        with damage_named(found.directory):
            if found.weights == DIFFUSERS:
                return load_diffusers(found.directory).to(device)
            if (found.directory / STATE_FILE).is_file():
                check_whole(found.directory, ("config.json", found.weights))
            return RemixDiT.from_directory(found.directory, found.weights, device)

    return read_while_training(path, load)


def read_while_training(path: str | Path, read: Callable[[], Result]) -> Result:
    """Read the newest weights of a run; again if it trains on and has removed them meanwhile."""
    while True:
        newest = newest_checkpoint(Path(path))
        try:
            return read()
        except (ValueError, OSError, RuntimeError, SafetensorError):
            # torch raises RuntimeError if the file is gone by the time it maps it.
            if newest is None or newest.exists():
                raise


def model_config(directory: Path) -> RemixConfig:
    """Return the configuration of a checkpoint's model."""
    with damage_named(directory):
        if is_diffusers(directory):
            return diffusers_config(directory)
        return read_config(directory)


def stated_config(path: str | Path) -> RemixConfig:
    """Return the configuration of a model, named as for `load_model`, without its weights."""
    return model_config(located(path).directory)


def located(path: str | Path, ema: bool = True) -> Found:
    """Return the place of the weights of a model, which is downloaded if it is not local."""
    found = find_model(Path(path), ema) or find_model(download(str(path)), ema)
    assert found is not None  # a download is local
    return found


@contextmanager
def damage_named(directory: Path) -> Iterator[None]:
    """Name the directory in the error of a model whose files are missing, cut short or no JSON."""
    try:
        yield
    except FileNotFoundError as error:
        missing = Path(error.filename or "a file").name
        raise ValueError(f"model must have whole files, got {directory}: no {missing}") from error
    except KeyError as error:
        raise ValueError(f"model must have whole files, got {directory}: no {error}") from error
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"model must have whole files, got {directory}: {brief(error)}") from error


def find_model(path: Path, ema: bool = True) -> Found | None:
    """Return the place of the weights of a local model, checkpoint or run, None if not local."""
    if not path.is_dir():
        return None
    if is_diffusers(path):
        return Found(path, DIFFUSERS)
    if (path / "state.json").is_file():
        return Found(path, "ema.safetensors" if ema else "model.safetensors")
    if (path / "model.safetensors").is_file():
        return Found(path, "model.safetensors")
    # The last step of a run is saved before its model is, so no model is newer than a checkpoint.
    newest = newest_checkpoint(path)
    if newest is None and ema and (path / "model" / "model.safetensors").is_file():
        return Found(path / "model", "model.safetensors")
    if newest is None:
        raise ValueError(f"checkpoint must be a model directory or a run with one, got {path}")
    return find_model(newest, ema)


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d+", path.name))
