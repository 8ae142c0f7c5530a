"""`remixdit import SOURCE`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from remixdit.cli.arguments import base_config, parse
from remixdit.cli.next_steps import say_next
from remixdit.interchange import ImportConfig, run_import

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class ImportArguments(ImportConfig):
    """Import a published checkpoint of DiT or Remix-DiT as a model directory."""

    source: Positional[Path]
    """A .pt or .safetensors file with the published names, or a directory of diffusers."""


def run(args: Sequence[str]) -> None:
    """Import."""
    config = base_config(parse(ImportArguments, args, "import"), ImportConfig)
    model = run_import(config)
    held = f", licence {model.config.license}" if model.config.license else ""
    wrote = f"wrote {config.output}: K = {model.num_bases}, N = {model.num_experts}{held}"
    sample = ("sample", config.output, "--output", config.output / "images.png")
    say_next(wrote, sample if model.config.draws_images else ("info", config.output))
