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
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from remixdit.first.optim import MixtureAdamW
from remixdit.model.loading import checkpoints, damage_named
from remixdit.model.model import RemixDiT

__all__ = ["hand_over", "restore", "save"]


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
