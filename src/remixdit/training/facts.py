"""What a run says of its training, for the card of its model."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from remixdit.data import ShardDataset
from remixdit.model.loading import Found, steps_done
from remixdit.training.run import DATA_DIR, flat, read_metrics, stated_settings

__all__ = ["training_facts"]


def training_facts(found: Found) -> dict[str, str]:
    """Return what is known of the training of a model, label => value; none outside of a run.

    Args:
        found: Place of the weights: a checkpoint of the run, or its finished model.
    """
    is_checkpoint = found.directory.parent.name == "checkpoints"
    run = found.directory.parents[1 if is_checkpoint else 0]
    if not is_checkpoint and found.directory.name != "model":
        return {}
    settings, rows = flat(stated_settings(run) or {}), read_metrics(run)
    if is_checkpoint:
        rows = [row for row in rows if row["step"] <= steps_done(found.directory)]
    if not rows or "batch_size" not in settings:
        return {}
    step, decay = rows[-1]["step"], settings.get("optimizer.ema_decay")
    last = is_checkpoint and found.weights == "model.safetensors"
    return {
        "images": images_of(run, settings),
        **({"started from": start} if (start := starts_of(settings)) else {}),
        "budget": f"{step:,} steps of {settings['batch_size']:,} images, "
        f"{step * settings['batch_size']:,} images in all",
        "experts in a step, M": str(settings.get("mixture.experts_per_step") or "all"),
        "optimizer": f"{optimizer_named(settings)}, precision {settings.get('precision')}, "
        f"seed {settings.get('seed')}",
        "weights": "those of the last step" if last else f"running average, decay {decay}",
        **loss_of(rows),
    }


def optimizer_named(settings: Mapping[str, Any]) -> str:
    """Return the algorithm and its learning rate, and the one of what Muon leaves to AdamW."""
    rate = settings.get("optimizer.learning_rate")
    if settings.get("optimizer.algorithm") != "muon":
        return f"AdamW, learning rate {rate}"
    beside = settings.get("optimizer.adamw_learning_rate")
    beside = "a quarter of it" if beside is None else beside
    return f"Muon, learning rate {rate}, AdamW for the rest, {beside}"


def images_of(run: Path, settings: Mapping[str, Any]) -> str:
    """Return the name of the training images, and their number if that is at hand."""
    source = str(settings.get("data"))
    for directory in (run / DATA_DIR, Path(source)):
        with suppress(OSError, ValueError):
            return f"{name_of(source)}, {len(ShardDataset(directory)):,} images"
    return name_of(source)


def starts_of(settings: Mapping[str, Any]) -> str:
    """Return the names of the models that the training started from."""
    given = [settings.get("init_from"), *(settings.get("further_bases") or [])]
    return ", ".join(name_of(one) for one in given if one)


def name_of(source: str) -> str:
    """Return a name of the hub as it is, but only the end of a path of this machine."""
    return Path(source).name if Path(source).is_absolute() else source


def loss_of(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return the loss over the last fifth of the lines of metrics, with its conditions."""
    last = [row for row in rows[-max(1, len(rows) // 5) :] if row.get("loss") is not None]
    if not last:
        return {}
    steps = f"steps {last[0]['step']:,} to {last[-1]['step']:,}"
    return {
        "training loss": f"{fmean(row['loss'] for row in last):.4f}, mean over the metrics of "
        f"{steps}; of training images, with weights that are not averaged"
    }
