"""Facts about a model: sizes, intervals, coefficients and cost, without loading its bases."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from remixdit.diffusion.costs import forward_flops, training_flops
from remixdit.model.config import RemixConfig
from remixdit.model.diffusers_dit import load_diffusers
from remixdit.model.loading import DIFFUSERS, Found, damage_named, find_model, model_config
from remixdit.model.model import download

__all__ = ["describe"]


def describe(path: str | Path, *, ema: bool = True) -> dict[str, Any]:
    """Return facts about a model, as JSON values.

    Args:
        path: A model directory, a checkpoint, a run, or a model of the Hugging Face hub.
        ema: Whether to take the averaged weights of a checkpoint rather than its last ones.
    """
    found = find_model(Path(path), ema) or find_model(download(str(path)), ema)
    if found is None:
        raise ValueError(f"model must hold a model.safetensors, got {path}")
    with damage_named(found.directory):
        return facts_of(found)


def facts_of(found: Found) -> dict[str, Any]:
    """Return the facts in the files of a model."""
    config, weights = model_config(found.directory), found.directory / found.weights
    state_file = found.directory / "state.json"
    step = json.loads(state_file.read_text("utf-8"))["step"] if state_file.is_file() else None
    return {
        "weights": str(weights),
        "step": step,
        **config.to_json(),
        "coefficient_kind": config.coefficients,
        **tables_of(found, config),
        "forward_flops_per_image": forward_flops(config.network),
        "training_flops_per_image": training_flops(config.network),
    }


def tables_of(found: Found, config: RemixConfig) -> dict[str, Any]:
    """Return the coefficients and the numbers of parameters."""
    if found.weights == DIFFUSERS:  # one expert
        weights = load_diffusers(found.directory).weights()
        shapes = {name: tuple(values.shape) for name, values in weights.items()}
        return {"coefficients": [[1.0]], "parameters": count_parameters(shapes, 1)}
    path = found.directory / found.weights
    with safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return {
        "coefficients": coefficients_in(path, config.coefficients),
        "parameters": count_parameters(shapes, config.num_bases),
    }


def coefficients_in(weights: Path, kind: str) -> Any:
    """Return the (N, K) coefficients, or (L, N, K) with a table for each block, as lists."""
    with safe_open(weights, "pt") as file:
        logits: torch.Tensor = file.get_tensor("logits")
    return (logits.softmax(-1) if kind == "softmax" else logits).tolist()


def count_parameters(shapes: Mapping[str, Sequence[int]], num_bases: int) -> dict[str, int]:
    """Return the numbers of parameters: in one network, in all, and in the bases alone."""
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    bases = sum(count for name, count in counts.items() if name.startswith("bases."))
    total = sum(counts.values())
    shared = total - bases - counts["logits"]
    return {"active": bases // num_bases + shared, "total": total, "bases": bases}
