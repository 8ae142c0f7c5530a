"""`remixdit train PRESET`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Annotated, Any

import tyro

from remixdit import distributed
from remixdit.cli.arguments import base_config, parse
from remixdit.cli.terminal import Bar, say
from remixdit.model.loading import newest_checkpoint, steps_done
from remixdit.training.config import MixtureConfig, TrainConfig
from remixdit.training.loop import train
from remixdit.training.presets import PRESETS, preset

__all__ = ["run"]

HELP = """\
usage: remixdit train PRESET --data SOURCE --output-dir RUN [OPTIONS]

{presets}

remixdit train PRESET --help    lists all options with the preset's values
"""


@dataclass(frozen=True, kw_only=True)
class TrainArguments(TrainConfig):
    """Train or fine-tune; the same command again resumes."""

    init_from: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Model to start from: a plain DiT to remix, a mixture, or several DiTs that become bases."""


def run(args: Sequence[str]) -> None:
    """Train."""
    name, *rest = args or [""]
    if name in ("-h", "--help"):
        width = max(map(len, PRESETS)) + 2
        lines = (
            f"  {key:{width}}{value.summary}\n{'':{width + 2}}{value.result}"
            for key, value in PRESETS.items()
        )
        print(HELP.format(presets="\n".join(lines)), end="")
        return
    if not name or name.startswith("-"):
        raise ValueError(f"preset must come first, one of {', '.join(PRESETS)}, got {name!r}")
    settings: dict[str, Any] = dict(preset(name).settings)
    rest, num_bases = one_name_each(rest)
    if num_bases > 1:  # the networks are the bases, and differ in every parameter
        mixture = settings.get("mixture", MixtureConfig())
        num_experts = max(num_bases, mixture.num_experts)
        settings["mixture"] = replace(
            mixture, num_bases=num_bases, num_experts=num_experts, mixed="all"
        )
    default = TrainArguments(data=tyro.MISSING, output_dir=tyro.MISSING, **settings)
    config = base_config(parse(TrainArguments, rest, f"train {name}", default), TrainConfig)
    try:
        show(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_resume(config)) from None
    finally:
        distributed.stop()


def one_name_each(words: Sequence[str]) -> tuple[list[str], int]:
    """Return `--from A B C` as `--from A --further-bases B C`, and the number of its names."""
    if "--from" not in words:
        return list(words), 0
    start = list(words).index("--from") + 1
    names = list(takewhile(lambda word: not word.startswith("-"), words[start:]))
    rest = list(words[start + len(names) :])
    further = ["--further-bases", *names[1:]] if len(names) > 1 else []
    return [*words[:start], *names[:1], *further, *rest], len(names)


def show(config: TrainConfig) -> None:
    """Train, with a progress bar."""
    progress = None
    with Bar("train", config.steps, "images", config.batch_size) as bar:
        for progress in train(config):
            if progress.stage == "train":
                bar.update(progress.done, progress.note)
            else:
                bar.show(f"encoding {config.data}: {progress.done} of {progress.total} images")
    if progress is None or progress.stage != "train":
        say(f"{config.output_dir} has its {config.steps} steps already; more --steps extend it")


def how_to_resume(config: TrainConfig) -> str:
    """Return where an interrupted run goes on."""
    newest = newest_checkpoint(config.output_dir)
    step = steps_done(newest) if newest else 0
    return f"interrupted; the same command goes on from step {step}"
