"""Training checkpoints: whole or not there.

    checkpoints/step-00001000/
        config.json             the model's
        model.safetensors       weights, as in a model directory
        ema.safetensors         their running average, likewise
        optimizer.safetensors   moments of every parameter
        state.json              steps done

A checkpoint is written beside its place, synced and renamed, so a crash leaves the last whole one.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from remixdit.model import RemixConfig, RemixDiT
from remixdit.optim import MixtureAdamW

__all__ = [
    "Found",
    "damage_named",
    "find_model",
    "hand_over",
    "load_model",
    "model_config",
    "newest_checkpoint",
    "restore",
    "save",
]


@dataclass(frozen=True)
class Found:
    """Where a model's weights are."""

    directory: Path
    weights: str
    """Name of the file in it."""


def save(run_dir: Path, step: int, model: RemixDiT, optimizer: MixtureAdamW, keep: int) -> Path:
    """Write the checkpoint of a step, then delete all but the newest `keep`."""
    final = run_dir / "checkpoints" / f"step-{step:08d}"
    beside = final.with_name(f".{final.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    model.save_pretrained(beside)
    with optimizer.averaged():
        write_tensors(beside / "ema.safetensors", model.mixture.state_dict())
    write_tensors(beside / "optimizer.safetensors", optimizer.state_dict())
    state = {"step": step, "basis_steps": optimizer.basis_steps}
    (beside / "state.json").write_text(json.dumps(state) + "\n")
    for path in beside.iterdir():
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    sync(final.parent)
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def hand_over(model: RemixDiT, optimizer: MixtureAdamW) -> None:
    """Hand over this process's slices, in the order in which `save` asks for them."""
    model.mixture.state_dict()
    with optimizer.averaged():
        model.mixture.state_dict()
    optimizer.state_dict()


def restore(directory: Path, model: RemixDiT, optimizer: MixtureAdamW) -> int:
    """Load a checkpoint into model and optimizer; return the steps done."""
    with damage_named(directory):
        state: dict[str, Any] = json.loads((directory / "state.json").read_text())
        averages, weights, moments = (
            load_file(directory / f"{name}.safetensors") for name in ("ema", "model", "optimizer")
        )
        step, basis_steps = int(state["step"]), state["basis_steps"]
    with optimizer.averaged():
        model.mixture.load_state_dict(averages)
    model.mixture.load_state_dict(weights)
    optimizer.load_state_dict(moments, basis_steps)
    return step


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest whole checkpoint of a run."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def load_model(path: str | Path, *, ema: bool = True, device: str = "cpu") -> RemixDiT:
    """Load what a user calls a checkpoint.

    Args:
        path: A model directory, a checkpoint, a run (its finished model, else its newest
            checkpoint), or a model of the Hugging Face hub.
        ema: Take the averaged weights of a checkpoint, not the last ones.
        device: Where the weights go.
    """
    found = find_model(Path(path), ema)
    if found is None:
        return RemixDiT.from_pretrained(path, device)
    with damage_named(found.directory):
        if found.weights == "model.safetensors":
            return RemixDiT.from_pretrained(found.directory, device)
        model = RemixDiT(model_config(found.directory))
        model.mixture.load_state_dict(load_file(found.directory / found.weights))
        return model.to(device).eval()


def model_config(directory: Path) -> RemixConfig:
    """Return what the model of a checkpoint is, without its weights."""
    with damage_named(directory):
        return RemixConfig.from_json(json.loads((directory / "config.json").read_text("utf-8")))


@contextmanager
def damage_named(directory: Path) -> Iterator[None]:
    """Name the directory of a model whose files are missing, cut short or no JSON."""
    try:
        yield
    except FileNotFoundError as error:
        missing = Path(error.filename or "a file").name
        raise ValueError(f"model must have whole files, got {directory}: no {missing}") from error
    except KeyError as error:
        raise ValueError(f"model must have whole files, got {directory}: no {error}") from error
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"model must have whole files, got {directory}: {error}") from error


def find_model(path: Path, ema: bool = True) -> Found | None:
    """Return where the weights of a local model, checkpoint or run are, None if not local."""
    if not path.is_dir():
        return None
    if (path / "state.json").is_file():
        return Found(path, "ema.safetensors" if ema else "model.safetensors")
    if (path / "model.safetensors").is_file():
        return Found(path, "model.safetensors")
    if ema and (path / "model" / "model.safetensors").is_file():
        return Found(path / "model", "model.safetensors")
    newest = newest_checkpoint(path)
    if newest is None:
        raise ValueError(f"checkpoint must be a model directory or a run with one, got {path}")
    return find_model(newest, ema)


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d+", path.name))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors of any device and layout."""
    save_file({name: values.detach().cpu().contiguous() for name, values in tensors.items()}, path)


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
