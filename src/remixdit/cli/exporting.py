"""`remixdit export CHECKPOINT`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tyro.conf import Positional

from remixdit.cli.arguments import base_config, parse
from remixdit.cli.checkpoints import newest_weights
from remixdit.cli.next_steps import say_next
from remixdit.cli.terminal import say
from remixdit.interchange import ExportConfig, run_export
from remixdit.model.loading import read_while_training

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class ExportArguments(ExportConfig):
    """Export experts as plain networks, for code that knows nothing of mixtures."""

    checkpoint: Positional[str]
    """A model directory, a run, a checkpoint of a run, or a model on the Hugging Face Hub."""


def run(args: Sequence[str]) -> None:
    """Export."""
    config = base_config(parse(ExportArguments, args, "export"), ExportConfig)

    def export() -> None:
        weights = newest_weights(config.checkpoint, config.ema)
        run_export(replace(config, checkpoint=weights))

    read_while_training(config.checkpoint, export)
    wrote = f"wrote {config.output}"
    if config.format == "pipeline":
        say_next(wrote, ("push", config.output, "owner/name"))
    else:
        say(wrote)
