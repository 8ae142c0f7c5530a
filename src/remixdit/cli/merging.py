"""`remixdit merge CHECKPOINT --output DIR`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tyro.conf import Positional

from remixdit import distributed
from remixdit.cli.arguments import base_config, parse
from remixdit.cli.checkpoints import open_model
from remixdit.cli.next_steps import say_next
from remixdit.cli.results import as_json
from remixdit.cli.terminal import follow
from remixdit.evaluation.held_out import open_held_out
from remixdit.evaluation.merging import MergeConfig, halves, measured_losses, search
from remixdit.files import new_directory, refuse_occupied
from remixdit.model.merging import merged, shares
from remixdit.model.model import RemixDiT

__all__ = ["run"]

RESULT_FILE = "merge.json"


@dataclass(frozen=True, kw_only=True)
class MergeArguments(MergeConfig):
    """Merge the experts into one plain network: their mean, or the best mix for held-out images."""

    checkpoint: Positional[str]
    """A model directory, a run, a checkpoint of a run, or a model on the Hugging Face Hub."""
    output: Path
    """Directory for the model; must be new or empty."""
    data: str | None = None
    """Held-out images to search on: shards that fit the model, or any source for pixels."""
    split: str | None = None
    """Name of the split of the data, e.g. test."""
    num_images: int = 0
    """Number of held-out images, chosen by the seed; 0 for all of them, up to 1,000."""
    json: bool = False
    """Print the whole result as JSON."""
    ema: bool = True
    """Use the averaged (EMA) weights of a checkpoint rather than its last ones."""
    device: str = "auto"
    """Device: auto, cpu or cuda. auto is the GPU if there is one."""

    def __post_init__(self) -> None:
        """Refuse values outside their range, and those that would change nothing."""
        super().__post_init__()
        if self.data is None and (self.split is not None or self.num_images):
            name = "split" if self.split is not None else "num_images"
            raise ValueError(f"{name} must be left out without data, got {getattr(self, name)}")


def run(args: Sequence[str]) -> None:
    """Merge, measure, write and print."""
    arguments = parse(MergeArguments, args, "merge")
    refuse_occupied(arguments.output)
    device = distributed.pick_device(arguments.device)
    model = open_model(arguments.checkpoint, ema=arguments.ema, precision="fp32", device=device)
    if model.num_experts < 2:
        raise ValueError(f"checkpoint must have experts to merge, got {model.num_experts}")
    weights, result = chosen(model, arguments)
    with new_directory(arguments.output) as beside:
        merged(model, weights).save_pretrained(beside)
        (beside / RESULT_FILE).write_text(as_json(result) + "\n", "utf-8")
    if arguments.json:
        print(as_json(result))
    elif arguments.data is not None:
        print(text(result))
    say_next(
        f"wrote {arguments.output}: one plain network of {model.num_experts} experts",
        ("sample", arguments.output, "--output", arguments.output / "images.png"),
    )


def chosen(model: RemixDiT, arguments: MergeArguments) -> tuple[Tensor, dict[str, Any]]:
    """Return the weights of the experts, and the facts about them as JSON values."""
    mean = shares(model)
    facts: dict[str, Any] = {"checkpoint": arguments.checkpoint, "data": None}
    if arguments.data is None:
        return mean, {**facts, "weights": mean.tolist()}
    config = base_config(arguments, MergeConfig)
    held, data = open_held_out(
        arguments.data, model.config, arguments.num_images, arguments.split, arguments.seed
    )
    searched, rest = halves(held)
    found = follow(search(model, searched, config))
    best = min(found, key=lambda candidate: candidate.loss)
    return best.weights, {
        **facts,
        "data": data,
        "weights": best.weights.tolist(),
        "candidates": [{"loss": loss, "weights": w.tolist()} for w, loss in found],
        "losses": {
            name: {
                "mean": measured_losses(model, images, mean, config),
                "searched": measured_losses(model, images, best.weights, config),
            }
            for name, images in (("searched", searched), ("rest", rest))
        },
    }


def text(result: Mapping[str, Any]) -> str:
    """Return the measured losses for a person."""
    losses, candidates = result["losses"], result["candidates"]
    mixture = losses["searched"]["mean"]["against"]["value"]
    lines = [
        f"candidate {number:3}  loss {candidate['loss']:.5f}, of the mixture {mixture:.5f}"
        + (", the mean" if number == 1 else "")
        for number, candidate in enumerate(candidates, 1)
    ]
    searched, others = (part["mean"]["num_images"] for part in losses.values())
    lines += [
        "",
        f"{'loss on':12}{f'{searched} searched':>18}{f'{others} others':>18}"
        f"{'over the mixture':>20}",
        row("mixture", *(part["mean"]["against"]["value"] for part in losses.values())),
    ]
    for name in ("mean", "searched"):
        values = [part[name]["value"] for part in losses.values()]
        difference = losses["rest"][name]["difference"]["relative"]
        lines.append(f"{row(name, *values)}{difference:>+20.2%}")
    return "\n".join(lines)


def row(name: str, *values: float) -> str:
    """Return a row of the table."""
    return f"{name:12}" + "".join(f"{value:>18.5f}" for value in values)
