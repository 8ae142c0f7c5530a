"""A SiT (arXiv:2401.08740) becomes a DiT of flow matching.

A SiT has the names and shapes of a DiT. It predicts the velocity from noise to data at a time in
[0, 1] that runs from noise to data and is embedded as it is; ours run from data to noise:

    ours(latents, t) = noise - data = -sit(latents, 1 - t)

So the last linear changes its sign, and `timestep_embedding` is "sit".

Shapes: P patch size, C channels, D hidden size.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from remixdit.interchange.layout import PATCHES

__all__ = ["as_flow", "kind_of", "kind_of_weights", "refuse_other_path"]

LAST = ("final_layer.linear.weight", "final_layer.linear.bias")
KINDS = {"sit": "SiT", "dit": "DiT"}
NAMES = {kind: re.compile(rf"(?<![A-Za-z]){name}(?![a-z])") for kind, name in KINDS.items()}


def kind_of(file_name: str, state: Mapping[str, Tensor], stated: Mapping[str, str]) -> str:
    """Return the embedding of timesteps in a file, "sit" or "dit": the latter if nothing tells.

    Args:
        file_name: Name of the file.
        state: Its weights.
        stated: Arguments of its training run.

    Raises:
        ValueError: Name, arguments and weights contradict each other.
    """
    found = {
        "its arguments": kind_of_run(stated),
        "its name": kind_named(file_name),
        "its weights": kind_of_weights(state),
    }
    told = {place: kind for place, kind in found.items() if kind}
    if len(set(told.values())) > 1:
        said = ", ".join(f"{place} of a {KINDS[kind]}" for place, kind in told.items())
        raise ValueError(
            f"timestep_embedding must be given for {file_name} (--timestep-embedding sit or dit), "
            f"got none: {said}"
        )
    return next(iter(told.values()), "dit")


def kind_of_run(stated: Mapping[str, str]) -> str | None:
    """Return what the arguments of a training run are of, None if they do not tell."""
    if "path_type" in stated or stated.get("prediction", "noise") != "noise":
        return "sit"
    return kind_named(stated.get("model", ""))


def kind_named(name: str) -> str | None:
    """Return what something is called, None if it is neither or both: SiT-XL-2-256x256.pt."""
    called = [kind for kind, pattern in NAMES.items() if pattern.search(name)]
    return called[0] if len(called) == 1 else None


def kind_of_weights(state: Mapping[str, Tensor]) -> str | None:
    """Return what the weights are of, None if they do not tell.

    All published SiTs have a second half of outputs. Nothing trains it, so it is still zero, as it
    began; a DiT learns variances there.
    """
    parts = [part for name in LAST if (part := outputs_in(state, name)) is not None]
    halves = [any(bool(part[:, half].any()) for part in parts) for half in (0, 1)]
    if halves[1]:
        return "dit"
    return "sit" if halves[0] and len(parts) == len(LAST) else None


def as_flow(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a SiT as those of a network that predicts noise - data."""
    found = dict(state)
    for name in LAST:
        parts = outputs_in(state, name)
        if name in state:
            found[name] = -(state[name] if parts is None else parts[:, 0].flatten(0, 1))
    return found


def outputs_in(state: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return a parameter of the last linear as (P P, 2, C, *), None if it has no second half."""
    if PATCHES not in state or name not in state or state[PATCHES].ndim != 4:
        return None
    _, channels, height, width = state[PATCHES].shape
    values = state[name]
    if values.ndim == 0 or len(values) != 2 * channels * height * width:
        return None
    return values.reshape(height * width, 2, channels, *values.shape[1:])


def refuse_other_path(stated: Mapping[str, str]) -> None:
    """Refuse a SiT that was trained for another path or prediction than ours."""
    for name, wanted in (("path_type", "Linear"), ("prediction", "velocity")):
        if stated.get(name, wanted) != wanted:
            raise ValueError(f"{name} must be {wanted} to import a SiT, got {stated[name]}")
