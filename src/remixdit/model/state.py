"""`state.json` of a training checkpoint: how far it is, and what its files must be.

    step            number of optimizer steps done
    skipped_steps   number of those whose gradients were not finite
    digests         sha256 of every file, and of the rest of this one

Checkpoints of earlier versions state the step alone.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from remixdit.files import file_digest
from remixdit.model.validation import brief, check_fields, json_object

__all__ = ["STATE_FILE", "State", "check_whole", "read_state", "write_state"]

STATE_FILE = "state.json"
# What is read of a checkpoint; nothing depends on its README.md.
FILES = ("config.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors")
MOST = 10**12  # steps


@dataclass(frozen=True, kw_only=True)
class State:
    """How far a checkpoint is."""

    step: int
    """Number of optimizer steps done."""
    skipped_steps: int = 0
    """Number of those that were skipped, as their gradients were not finite."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """sha256 by the name of a file; none in a checkpoint of an earlier version."""

    def own_digest(self) -> str:
        """Return the sha256 of all but the digests."""
        rest = {name: value for name, value in asdict(self).items() if name != "digests"}
        return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_state(directory: Path, step: int, skipped_steps: int) -> None:
    """Write the state of a checkpoint whose other files are written."""
    state = State(step=step, skipped_steps=skipped_steps)
    digests = {path.name: file_digest(path) for path in sorted(directory.iterdir())}
    values = {**asdict(state), "digests": {**digests, STATE_FILE: state.own_digest()}}
    (directory / STATE_FILE).write_text(json.dumps(values, indent=1) + "\n", "utf-8")


def read_state(directory: Path) -> State:
    """Return the state of a checkpoint."""
    path = directory / STATE_FILE
    if not path.is_file():
        raise ValueError(f"model must have whole files, got {directory}: no {STATE_FILE}")
    values = json_object(path)
    check_fields(State, values, str(path), largest={"step": MOST, "skipped_steps": MOST})
    state = State(**values)
    if not 0 <= state.skipped_steps <= state.step:
        raise ValueError(
            f"skipped_steps of {path} must be in 0..{state.step}, got {state.skipped_steps}"
        )
    named = re.fullmatch(r"step-(\d+)", directory.name)
    if named and int(named[1]) != state.step:
        raise ValueError(
            f"step of {path} must be that of the directory's name, {int(named[1])}, "
            f"got {state.step}"
        )
    if state.digests and state.digests.get(STATE_FILE) != state.own_digest():
        raise ValueError(f"{path} must have the sha256 that it states, got another: it is damaged")
    return state


def check_whole(directory: Path, names: Sequence[str] = FILES) -> State:
    """Refuse a checkpoint of which a file is missing or is not what was written.

    Args:
        directory: That of the checkpoint.
        names: Files to check.
    """
    state = read_state(directory)
    for name in names:
        path = directory / name
        if not path.is_file():
            raise ValueError(f"model must have whole files, got {directory}: no {name}")
        if state.digests and file_digest(path) != state.digests.get(name):
            raise ValueError(
                f"{path} must have the sha256 that {STATE_FILE} states, got another: it is damaged"
            )
        if not state.digests and path.suffix == ".safetensors":
            check_length(path)
    return state


def check_length(path: Path) -> None:
    """Refuse a file of tensors that is cut short, all that is known of it without a digest."""
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file, got: {brief(error)}") from error
