"""`remixdit train PRESET`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Annotated, Any

import tyro

from remixdit import distributed
from remixdit.cli.arguments import base_config, parse
from remixdit.cli.checkpoints import newest_start
from remixdit.cli.next_steps import say_next, torchrun
from remixdit.cli.signals import INTERRUPTED, TEMPORARY, stopped_by_signals
from remixdit.cli.terminal import Bar, say
from remixdit.model.loading import newest_checkpoint, steps_done
from remixdit.training.config import MixtureConfig, TrainConfig
from remixdit.training.loop import train
from remixdit.training.presets import PRESETS, check_start, preset
from remixdit.training.stopping import Stop

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
    name = args[0] if args else ""
    if name in ("-h", "--help"):
        width = max(map(len, PRESETS)) + 2
        lines = (
            f"  {key:{width}}{value.summary}\n{'':{width + 2}}{value.result}"
            for key, value in PRESETS.items()
        )
        print(HELP.format(presets="\n".join(lines)), end="")
        return
    config = config_of(args)
    check_start(name, config.init_from)
    if config.init_from and newest_checkpoint(config.output_dir) is None:
        for given in (config.init_from, *config.further_bases):
            newest_start(given)  # says which step the run starts from
    stop = Stop()
    try:
        with stopped_by_signals(stop):
            show(config, stop)
    except KeyboardInterrupt:
        stop.ask("SIGINT")
    finally:
        distributed.stop()
    if stop.reason and not is_finished(config):
        end_early(config, stop, ["train", *args])


def config_of(args: Sequence[str]) -> TrainConfig:
    """Return the run that a preset and options describe."""
    name, *rest = args or [""]
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
    return base_config(parse(TrainArguments, rest, f"train {name}", default), TrainConfig)


def one_name_each(words: Sequence[str]) -> tuple[list[str], int]:
    """Return `--from A B C` as `--from A --further-bases B C`, and the number of its names."""
    if "--from" not in words:
        return list(words), 0
    start = list(words).index("--from") + 1
    names = list(takewhile(lambda word: not word.startswith("-"), words[start:]))
    rest = list(words[start + len(names) :])
    further = ["--further-bases", *names[1:]] if len(names) > 1 else []
    return [*words[:start], *names[:1], *further, *rest], len(names)


def show(config: TrainConfig, stop: Stop) -> None:
    """Train, with a progress bar; say where it goes on from, and what is next."""
    progress = None
    with Bar("train", config.steps, "images", config.batch_size) as bar:
        for progress in train(config, stop):
            if progress.stage != "train":
                bar.show(f"encoding {config.data}: {progress.done} of {progress.total} images")
                continue
            if bar.first < 0 and progress.done > 1:
                say(f"{config.output_dir} goes on from step {progress.done - 1} of {config.steps}")
            bar.update(progress.done, progress.note)
    if progress is None or progress.stage != "train":
        run = config.output_dir
        say_next(
            f"{run} has its {config.steps} steps already, and more --steps extend it; the model is "
            f"{run / 'model'}",
            ("sample", run, "--output", run / "images.png"),
        )
    elif is_finished(config):
        run = config.output_dir
        say_next(
            f"trained {config.steps} steps; the model is {run / 'model'}",
            ("sample", run, "--output", run / "images.png"),
            ("plot", run),
            ("demo", run),
        )


def is_finished(config: TrainConfig) -> bool:
    """Whether a run has its last step."""
    newest = newest_checkpoint(config.output_dir)
    return newest is not None and steps_done(newest) >= config.steps


def end_early(config: TrainConfig, stop: Stop, command: Sequence[str]) -> None:
    """Say what was saved and how to go on; end with the exit code for that."""
    newest = newest_checkpoint(config.output_dir)
    saved = f"saved {newest}" if newest else "there was nothing to save yet"
    count, own = (int(os.environ.get(f"{of}WORLD_SIZE", "1")) for of in ("", "LOCAL_"))
    start = torchrun(own, count // own) if count > 1 else ""
    say_next(f"stopped by {stop.reason}; {saved}", command, start=start)
    raise SystemExit(INTERRUPTED if stop.reason == "SIGINT" else TEMPORARY)
