"""`remixdit encode SOURCE`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tyro.conf import Positional

from remixdit import distributed
from remixdit.cli.arguments import base_config, parse
from remixdit.cli.next_steps import say_next
from remixdit.cli.terminal import follow, say
from remixdit.data import EncodeConfig, check_apart, encode, open_source

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class EncodeArguments(EncodeConfig):
    """Turn images into shards of latents or pixels. The same command again continues the work."""

    source: Positional[str]
    """A folder of class folders, Parquet, npz, tar, mnist5k, or a data set on the Hub."""
    output: Path
    """Directory for the shards."""
    split: str | None = None
    """Name of the split to encode, e.g. train."""
    device: str = "auto"
    """Device of the autoencoder: auto, cpu or cuda. auto is the GPU if there is one."""


def run(args: Sequence[str]) -> None:
    """Encode this process's share of the images."""
    arguments = parse(EncodeArguments, args, "encode")
    device = distributed.pick_device(arguments.device)
    config = replace(base_config(arguments, EncodeConfig), device=str(device))
    check_apart(arguments.source, arguments.output, arguments.split)
    source = open_source(arguments.source, arguments.split)
    ranks = distributed.start(device)
    work = encode(source, arguments.output, config, rank=ranks.rank, num_ranks=ranks.num_ranks)
    try:
        total, skipped = follow(work, {"encode": "images"})
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command resumes") from None
    finally:
        distributed.stop()
    if skipped:
        say(f"{skipped} of {total} images were skipped: {arguments.output}/index.json says why")
    preset = "pixels-small" if config.autoencoder == "none" else "s2-plain"
    training = ("train", preset, "--data", arguments.output, "--output-dir", "run")
    say_next(f"wrote {total - skipped} images to {arguments.output}", training)
