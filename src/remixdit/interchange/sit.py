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

__all__ = ["as_flow", "is_sit", "is_stated_sit", "refuse_other_path"]

LAST = ("final_layer.linear.weight", "final_layer.linear.bias")
NAME = re.compile(r"(?<![A-Za-z])SiT(?![a-z])")  # SiT-XL-2-256x256.pt, SiT-B/2


def is_sit(state: Mapping[str, Tensor]) -> bool:
    """Whether the weights are of a SiT with a second half of outputs, as all published ones have.

    Nothing trains that half, so it is still zero, as it began; a DiT learns variances there.
    """
    parts = [outputs_in(state, name) for name in LAST]
    used = any(part is not None and bool(part[:, 0].any()) for part in parts)
    return used and not any(part is None or bool(part[:, 1].any()) for part in parts)


def is_stated_sit(file_name: str, stated: Mapping[str, str]) -> bool:
    """Whether a file is called a SiT, or the arguments of its training run are those of one."""
    if "path_type" in stated or stated.get("prediction", "noise") != "noise":
        return True
    return any(NAME.search(name) for name in (file_name, stated.get("model", "")))


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
