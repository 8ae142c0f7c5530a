"""`remixdit bench train|sample|data`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tyro.conf import Positional

from remixdit.bench import (
    BenchConfig,
    LoaderConfig,
    Under,
    bench_loader,
    bench_sampling,
    bench_training,
)
from remixdit.cli.arguments import base_config, parse
from remixdit.cli.terminal import Bar

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class BenchArguments(BenchConfig):
    """Time training steps, or whole trajectories: a plain DiT, Remix-DiT, and naive mixing.

    The variants run interleaved. Times are medians; compare their ratios.
    """

    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True, kw_only=True)
class LoaderArguments(LoaderConfig):
    """Time the data loader on a directory of shards."""

    shards: Positional[str]
    """Directory of shards that `remixdit encode` wrote."""
    json: bool = False
    """Print the result as JSON."""


# One image of a trajectory takes hundreds of passes, so three trajectories are enough.
DEFAULTS = {"train": BenchArguments(), "sample": BenchArguments(batch_size=1, steps=3)}
MEASURES = {"train": bench_training, "sample": bench_sampling}
USAGE = "usage: remixdit bench train|sample|data [OPTIONS]; each has a --help of its own"


def run(args: Sequence[str]) -> None:
    """Measure this machine."""
    what, *rest = args or [""]
    if what in ("-h", "--help"):
        print(USAGE)
        return
    if what == "data":
        loader = parse(LoaderArguments, rest, "bench data")
        report(bench_loader(base_config(loader, LoaderConfig)), loader.json)
        return
    if what not in MEASURES:
        raise ValueError(f"bench must be train, sample or data, got {what!r}")
    arguments = parse(BenchArguments, rest, f"bench {what}", DEFAULTS[what])
    result: dict[str, Any] = {}
    with Bar(f"bench {what}", 1) as bar:
        for progress in MEASURES[what](base_config(arguments, BenchConfig)):
            if isinstance(progress, Under):
                bar.update(progress.done, progress.name, total=progress.total)
            else:
                result = progress
    report(result, arguments.json)


def report(result: dict[str, Any], as_json: bool) -> None:
    """Print the result, for a program or for a person."""
    if as_json:
        print(json.dumps(result, indent=1, default=str))
        return
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    for name, timing in result["variants"].items():
        low, high = timing["quartiles_ms"]
        print(f"{name:16} {timing['median_ms']:10.1f} ms   ({low:.1f} to {high:.1f})")
    for name, facts in result["variants"].items():
        if facts.get("peak_bytes") or "memory" in facts:
            print(f"{name:16} {memory_line(facts)}")
    for name, ratios in result.get("settings", {}).items():
        print(f"{name:16} {', '.join(f'{of} {value:.4g}' for of, value in ratios.items())}")
    for name, value in result.items():
        if name.endswith("_per_second"):
            print(f"{name:32} {value:.4g}")


def memory_line(facts: Mapping[str, Any]) -> str:
    """Return the memory of a variant, and the bytes that a step sends to other processes."""
    words = []
    if facts.get("peak_bytes"):
        words.append(f"peak {megabytes(facts['peak_bytes'])}")
    if facts.get("excess_fraction") is not None:
        words.append(f"{facts['excess_fraction']:+.1%} of the computed")
    for name, count in facts.get("memory", {}).items():
        if count:
            words.append(f"{name} {megabytes(count)}")
    if "reduced_bytes" in facts:
        words.append(f"gradients reduced {megabytes(facts['reduced_bytes'])} a step")
    return ", ".join(words)


def megabytes(count: int) -> str:
    """Return a number of bytes for a person."""
    return f"{count / 1e6:.0f} MB"
