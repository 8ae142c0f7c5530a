"""Facts about a model: sizes, intervals, coefficients and cost, without loading its bases."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from remixdit.diffusion.costs import forward_flops, training_flops
from remixdit.model.config import RemixConfig
from remixdit.model.diffusers_dit import load_diffusers
from remixdit.model.imagenet import has_imagenet_names
from remixdit.model.loading import DIFFUSERS, Found, damage_named, located, model_config

__all__ = ["describe"]


def describe(path: str | Path, *, ema: bool = True) -> dict[str, Any]:
    """Return facts about a model, as JSON values.

    Args:
        path: A model directory, a checkpoint, a run, or a model of the Hugging Face hub.
        ema: Whether to take the averaged weights of a checkpoint rather than its last ones.
    """
    found = located(path, ema)
    with damage_named(found.directory):
        return facts_of(found)


def facts_of(found: Found) -> dict[str, Any]:
    """Return the facts in the files of a model."""
    config, weights = model_config(found.directory), found.directory / found.weights
    return {
        "weights": str(weights),
        "step": found.step,
        **config.to_json(),
        "has_imagenet_names": has_imagenet_names(config),
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
        "coefficients": coefficients_in(path, config),
        "parameters": count_parameters(shapes, config.num_bases),
    }


def coefficients_in(weights: Path, config: RemixConfig) -> Any:
    """Return the (N, K) coefficients, or (L, N, K) with a table for each block, as lists."""
    with safe_open(weights, "pt") as file:
        shape = file.get_slice("logits").get_shape() if "logits" in file.keys() else None  # noqa: SIM118
        own = [config.num_experts, config.num_bases]
        if shape is None or shape[-2:] != own or len(shape) != 2 + config.per_block:
            raise ValueError(f"logits of {weights} must have the shape {own}, got {shape}")
        logits: torch.Tensor = file.get_tensor("logits")
    if not logits.isfinite().all():
        raise ValueError(f"logits of {weights} must be finite, got NaN or infinity")
    return (logits.softmax(-1) if config.coefficients == "softmax" else logits).tolist()


def count_parameters(shapes: Mapping[str, Sequence[int]], num_bases: int) -> dict[str, int]:
    """Return the numbers of parameters: in one network, in all, and in the bases alone."""
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    bases = sum(count for name, count in counts.items() if name.startswith("bases."))
    total = sum(counts.values())
    shared = total - bases - counts["logits"]
    return {"active": bases // num_bases + shared, "total": total, "bases": bases}
