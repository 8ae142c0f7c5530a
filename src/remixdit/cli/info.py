"""`remixdit info CHECKPOINT`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tyro.conf import Positional

from remixdit.cli.arguments import parse
from remixdit.cli.checkpoints import newest_weights
from remixdit.cli.terminal import show
from remixdit.figures.text import one_line
from remixdit.model.describe import describe
from remixdit.model.imagenet import imagenet_names
from remixdit.model.loading import read_while_training

__all__ = ["run"]

MAX_NAMES = 10  # of classes that are shown


@dataclass(frozen=True, kw_only=True)
class InfoArguments:
    """Show what a model is: sizes, intervals, coefficients, parameters and cost."""

    checkpoint: Positional[str]
    """A model directory, a run, a checkpoint of a run, or a model on the Hugging Face Hub."""
    json: bool = False
    """Print all facts as JSON."""
    ema: bool = True
    """Use the averaged (EMA) weights of a checkpoint rather than its last ones."""


def run(args: Sequence[str]) -> None:
    """Describe a model on stdout."""
    arguments = parse(InfoArguments, args, "info")
    path, ema = arguments.checkpoint, arguments.ema
    facts = read_while_training(path, lambda: describe(newest_weights(path, ema), ema=ema))
    show(json.dumps(facts, indent=1, ensure_ascii=False) if arguments.json else text(facts))


def text(facts: Mapping[str, Any]) -> str:
    """Return the facts for a person."""
    network, parameters = facts["network"], facts["parameters"]
    step = "" if facts["step"] is None else f", step {facts['step']:,}"
    return "\n".join(
        [
            f"weights      {facts['weights']}{step}",
            f"network      {network['depth']} blocks of width {network['hidden_size']}, "
            f"{network['num_heads']} heads, patch {network['patch_size']}",
            f"latents      {network['in_channels']} x {network['input_size']} x "
            f"{network['input_size']}, autoencoder {facts['autoencoder']['name']}",
            f"classes      {network['num_classes']:,}{names_text(facts)}",
            f"predicts     {facts['prediction_type']}"
            + (", with learned variance" if network["learn_sigma"] else ""),
            f"mixture      K = {facts['num_bases']} bases, N = {facts['num_experts']} experts, "
            f"{facts['coefficient_kind']}, of {facts['mixed']}",
            f"parameters   {parameters['active']:,} active, {parameters['total']:,} in all",
            f"cost         {facts['forward_flops_per_image'] / 1e9:,.3g} GFLOP an image and step, "
            f"{facts['training_flops_per_image'] / 1e9:,.3g} in training",
            *([f"licence      {one_line(facts['license'])}"] if facts["license"] else []),
            *(table(facts) if facts["num_experts"] > 1 else []),
        ]
    )


def names_text(facts: Mapping[str, Any]) -> str:
    """Return the first names of a model's classes, or whose names they go by."""
    if facts["has_imagenet_names"]:
        names = imagenet_names()
        return f", with ImageNet's names: {names[0]} to {names[-1]}"
    names = tuple(map(one_line, facts["class_names"]))
    more = ", ..." if len(names) > MAX_NAMES else ""
    return f": {', '.join(names[:MAX_NAMES])}{more}" if names else ""


def table(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the coefficients of every expert; with a table for each block, their mean."""
    coefficients = facts["coefficients"]
    if facts["per_block"]:
        yield "coefficients, mean over the blocks:"
        count = len(coefficients)
        coefficients = [
            [sum(values) / count for values in zip(*rows, strict=True)]
            for rows in zip(*coefficients, strict=True)
        ]
    else:
        yield "coefficients:"
    for ends, row in zip(pairwise(facts["boundaries"]), coefficients, strict=True):
        interval = f"[{ends[0]:g}, {ends[1]:g})"
        yield f"  {interval:>16}  " + "  ".join(f"{value:5.2f}" for value in row)
