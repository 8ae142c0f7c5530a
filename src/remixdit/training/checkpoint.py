"""Training checkpoints: whole or not there.

    checkpoints/step-00001000/
        config.json             the model's
        model.safetensors       weights, as in a model directory
        ema.safetensors         their running average, likewise
        optimizer.safetensors   moments of every parameter
        state.json              number of steps done, and the sha256 of every file

A checkpoint is written beside its place, synced and renamed, so a crash leaves the last whole one.
It does not depend on the number of processes. Tensors are gathered on the CPU of the first
process, one at a time, and written in a thread during the next steps.
"""

import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from remixdit.distributed import agree, barrier
from remixdit.distributed.parallel import checksum_of, fill, whole
from remixdit.files import (
    locked,
    make_directory,
    partial_path,
    remove,
    save_tensors,
    sync,
    write_file,
)
from remixdit.model.config import RemixConfig
from remixdit.model.loading import checkpoints, damage_named, steps_done
from remixdit.model.model import RemixDiT, write_model_files
from remixdit.model.state import State, check_whole, read_state, write_state
from remixdit.training.average import Average
from remixdit.training.run import sync_metrics

__all__ = ["Writer", "gathered", "refuse_damaged", "restore", "write_model"]

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]

NONE_WHOLE = "no older one is whole"


class Writer:
    """Writes checkpoints of a run in a thread, one at a time.

    Args:
        run_dir: Directory of the run.
        keep: Number of checkpoints to keep, the newest ones.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.run_dir, self.keep = run_dir, keep
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        self.saved: int | None = None  # the step of the last one that is whole

    def write(
        self, step: int, config: RemixConfig, parts: dict[str, Tensors], skipped_steps: int
    ) -> None:
        """Begin to write the checkpoint of a step; wait for the one before.

        Args:
            step: Number of steps done.
            config: Configuration of the model.
            parts: Tensors that nothing else writes to, by the name of their file.
            skipped_steps: Number of those steps that were skipped.
        """
        self.wait()
        self.pending = self.pool.submit(self._write, step, config, parts, skipped_steps)

    def wait(self) -> None:
        """Wait until the checkpoint is written; raise an error that happened meanwhile."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raise an error that happened while a checkpoint was written, without waiting."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self.pool.shutdown()

    def _write(
        self, step: int, config: RemixConfig, parts: dict[str, Tensors], skipped_steps: int
    ) -> None:
        final = self.run_dir / "checkpoints" / f"step-{step:08d}"
        beside = partial_path(final)
        try:
            # Neither is made anew in a run that somebody has removed.
            sync(self.run_dir / "config.json")
            final.parent.mkdir(exist_ok=True)
            sync(self.run_dir)
            shutil.rmtree(beside, ignore_errors=True)
            self._fill(beside, step, config, parts, skipped_steps)
            # Whoever resumes from this checkpoint relies on the lines before it.
            sync_metrics(self.run_dir)
            if final.exists():
                remove(final)
            beside.rename(final)
            sync(final.parent)
        except OSError as error:
            if str(beside) in str(error.filename):
                error.filename = str(final)  # the name that the user knows
            raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        self.saved = step
        self._prune()

    def _fill(
        self,
        beside: Path,
        step: int,
        config: RemixConfig,
        parts: dict[str, Tensors],
        skipped_steps: int,
    ) -> None:
        beside.mkdir()
        write_model_files(beside, config)
        for name, tensors in parts.items():
            save_tensors(tensors, beside / f"{name}.safetensors")
        write_state(beside, step, skipped_steps)
        for path in (*beside.iterdir(), beside):
            sync(path)

    def _prune(self) -> None:
        for old in checkpoints(self.run_dir)[: -self.keep]:
            try:
                remove(old)
            except OSError as error:
                logger.warning("%s cannot be removed: %s", old, error.strerror)


def gathered(
    model: RemixDiT,
    optimizer: torch.optim.Optimizer,
    average: Average,
    keeps: bool,
    only: str = "",
) -> dict[str, Tensors]:
    """Return copies of all that a checkpoint holds, by file, on the CPU.

    Args:
        model: If it is sharded, all processes must call together.
        optimizer: AdamW.
        average: Average of the weights.
        keeps: Whether this process keeps the copies; the others get empty parts.
        only: The name of the one part to gather, by default all.
    """
    names = model.experts.disk_names()
    weights = model.network.state_dict(keep_vars=True)
    parts: dict[str, Tensors] = {"model": {}, "ema": {}, "optimizer": {}}
    for key, name in names.items():
        values = weights[key]
        found = {"model": {name: values}, "ema": {name: average.values.get(key, values)}}
        state = optimizer.state.get(values, {})
        moments = {f"{k}.{moment_name(name)}": v for k, v in state.items() if k != "step"}
        for part, tensors in {**found, "optimizer": moments}.items():
            if part == (only or part):
                for label, tensor in tensors.items():
                    put(parts[part], label, tensor, keeps)
    return parts


def moment_name(name: str) -> str:
    """Return the name of a weight's moments: that of the parameter, without `bases.`."""
    return name.removeprefix("bases.").removeprefix("shared.")


def put(tensors: Tensors, name: str, values: Tensor, keeps: bool) -> None:
    """Add a copy of a tensor, gathered from all processes."""
    found = whole(values.detach())
    if keeps:
        tensors[name] = found.to("cpu", copy=True).contiguous()


def write_model(directory: Path, config: RemixConfig, weights: Tensors) -> None:
    """Write a model directory; the weights, which make it a model, come last."""
    make_directory(directory)
    write_model_files(directory, config)
    write_file(directory / "model.safetensors", lambda path: save_tensors(weights, path))


def restore(
    directory: Path, model: RemixDiT, optimizer: torch.optim.Optimizer, average: Average
) -> tuple[State, int]:
    """Load a checkpoint, tensor by tensor.

    Returns:
        How far it is, and a checksum of the weights.
    """
    state = read_state(directory)
    with damage_named(directory):
        weights = model.network.state_dict(keep_vars=True)
        keys = {name: key for key, name in model.experts.disk_names().items()}
        checksum = 0
        for name, values in tensors_in(directory / "model.safetensors", set(keys)):
            check_like(name, weights[keys[name]], values)
            checksum += checksum_of(values)
            fill(weights[keys[name]], values)
        for name, values in tensors_in(directory / "ema.safetensors", set(keys)):
            if keys[name] in average.values:  # buffers are not averaged
                check_like(name, average.values[keys[name]], values)
                fill(average.values[keys[name]], values)
        taken = state.step - state.skipped_steps
        restore_moments(directory / "optimizer.safetensors", model, optimizer, taken)
    return state, checksum % 2**62


def restore_moments(
    path: Path, model: RemixDiT, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Load the moments of every trained parameter, after so many steps that were not skipped."""
    weights = model.network.state_dict(keep_vars=True)
    targets: Tensors = {}
    for key, name in model.experts.disk_names().items():
        if weights[key] in optimizer.state:
            found = optimizer.state[weights[key]]
            found["step"].fill_(step)
            for kind in found.keys() - {"step"}:
                targets[f"{kind}.{moment_name(name)}"] = found[kind]
    for name, values in tensors_in(path, set(targets)):
        # The first version of this format gave shared parameters a dimension of 1.
        own = values[0] if values.shape == (1, *targets[name].shape) else values
        check_like(name, targets[name], own)
        fill(targets[name], own)


def check_like(name: str, own: Tensor, given: Tensor) -> None:
    """Refuse a tensor of another shape or dtype, which would be broadcast or rounded."""
    for what in ("shape", "dtype"):
        wanted, found = (getattr(values, what) for values in (own, given))
        if wanted != found:
            wanted, found = (tuple(v) if what == "shape" else v for v in (wanted, found))
            raise ValueError(f"{name} must have the {what} {wanted}, got {found}")


def refuse_damaged(run_dir: Path, allow_older: bool, is_first: bool) -> None:
    """Refuse to go on from a damaged checkpoint, or set it aside; all processes call this.

    Args:
        run_dir: Directory of the run.
        allow_older: Set damaged checkpoints aside where an older one is whole.
        is_first: Whether this process does so.

    Raises:
        ValueError: A checkpoint is damaged, or another run is writing them.
    """
    # What another run has not finished is no damage, so the lock comes first.
    with locked(run_dir) if is_first and checkpoints(run_dir) else nullcontext():
        damaged: dict[Path, str] = {}
        for path in reversed(checkpoints(run_dir)):
            if not (damage := damage_of(path)):
                break
            damaged[path] = damage
        newest = max((path for path in checkpoints(run_dir) if path not in damaged), default=None)
        agree({"checkpoint to go on from": newest})
        if damaged and not (newest and allow_older):
            way_out = f"--allow-older goes on from step {steps_done(newest)}" if newest else ""
            raise ValueError(f"{next(iter(damaged.values()))}; {way_out or NONE_WHOLE}")
        for path, damage in damaged.items() if is_first else ():
            aside = path.with_name(f"damaged-{path.name}")
            logger.warning("%s; it is kept as %s", damage, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    barrier()


def damage_of(directory: Path) -> str:
    """Return what is wrong with the files of a checkpoint, "" if nothing is."""
    try:
        check_whole(directory)
    except ValueError as error:
        return str(error)
    return ""


def tensors_in(path: Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file one by one; refuse a file that lacks one."""
    with safe_open(path, "pt") as file:
        missing = sorted(names - set(file.keys()))
        if missing:
            raise ValueError(f"{path} must hold all weights of the model, got none for {missing}")
        for name in sorted(names):
            yield name, file.get_tensor(name)
