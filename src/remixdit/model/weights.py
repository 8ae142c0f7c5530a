"""The weights in a `model.safetensors`, which others may have written."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from remixdit.model.validation import brief, shown

__all__ = ["check_same_shapes", "read_weights"]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights in a file; refuse those with which nothing can be computed."""
    if not path.is_file():
        raise ValueError(f"model must have whole files, got {path.parent}: no {path.name}")
    try:
        weights = load_file(path)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # a lying header
        raise ValueError(
            f"model must have whole files, got {path.parent}: {path.name}: {brief(error)}"
        ) from error
    dtypes = {values.dtype for values in weights.values()}
    if len(dtypes) != 1 or not all(dtype.is_floating_point for dtype in dtypes):
        named = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"weights of {path} must be of one floating dtype, got {named}")
    for name, values in weights.items():
        # A sum is the cheapest look at every number; it may overflow where they are finite.
        if not values.sum().isfinite() and not values.isfinite().all():
            raise ValueError(f"{name} of {path} must be finite, got NaN or infinity")
    return weights


def check_same_shapes(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Refuse weights that are missing, unknown or of another shape."""
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or extra:
        # Of a foreign file, names of any length and number.
        lists = [shown(names, 300) for names in (missing, extra)]
        raise ValueError(f"weights must match the model: missing {lists[0]}, extra {lists[1]}")
    for name, values in own.items():
        if values.shape != given[name].shape:
            raise ValueError(
                f"{name} must have the shape {tuple(values.shape)}, got {tuple(given[name].shape)}"
            )
