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
    """Time training steps, or trajectories: ours, plain and naive, in turns."""

    json: bool = False
    """Print everything as JSON."""


@dataclass(frozen=True, kw_only=True)
class LoaderArguments(LoaderConfig):
    """Time the loader on a directory of shards."""

    shards: Positional[str]
    """A directory that `remixdit encode` wrote."""
    json: bool = False
    """Print everything as JSON."""


def run(args: Sequence[str]) -> None:
    """Measure this machine."""
    what, *rest = args or [""]
    if what in ("-h", "--help"):
        print("usage: remixdit bench train|sample|data [OPTIONS]; each has a --help of its own")
        return
    if what == "data":
        loader = parse(LoaderArguments, rest, "bench data")
        report(bench_loader(base_config(loader, LoaderConfig)), loader.json)
        return
    if what not in ("train", "sample"):
        raise ValueError(f"bench must be of train, sample or data, got {what!r}")
    arguments = parse(BenchArguments, rest, f"bench {what}")
    config = base_config(arguments, BenchConfig)
    measure = bench_training if what == "train" else bench_sampling
    result: dict[str, Any] = {}
    with Bar(f"bench {what}", config.steps, "rounds") as bar:
        for progress in measure(config):
            if isinstance(progress, Under):
                bar.update(progress.done, progress.name)
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
    for name, value in result.items():
        if "_over_" in name or " over " in name or name.endswith("_per_second"):
            print(f"{name:32} {value:.4g}")


def memory_line(facts: Mapping[str, Any]) -> str:
    """Return what a variant takes of memory, and what a step sends to other processes."""
    words = []
    if facts.get("peak_bytes"):
        words.append(f"peak {megabytes(facts['peak_bytes'])}")
    if facts.get("excess_fraction") is not None:
        words.append(f"{facts['excess_fraction']:.1%} more than needed")
    for name, count in facts.get("memory", {}).items():
        if count:
            words.append(f"{name} {megabytes(count)}")
    if "reduced_bytes" in facts:
        words.append(f"sent {megabytes(facts['reduced_bytes'])} a step")
    return ", ".join(words)


def megabytes(count: int) -> str:
    """Return a number of bytes for a person."""
    return f"{count / 1e6:.0f} MB"
