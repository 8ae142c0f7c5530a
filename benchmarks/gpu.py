"""How fast is Remix-DiT on one GPU? All of it in one command, in at most eight minutes.

    python benchmarks/gpu.py --output results              # one H100: S, B, L and XL, 256 tokens
    python benchmarks/gpu.py --tiny --device cpu           # the same code in under a minute

Training: a plain DiT, all experts in every step (M = N), the published method (M = 1), and naive
mixing, eager and compiled block by block, in bfloat16 arithmetic under float32 parameters.
Sampling: plain, experts mixed at the boundaries of their intervals, pre-computed, and naive.

Rows are written to OUTPUT/gpu.md and OUTPUT/gpu.json as they come. A row that does not fit into
memory says so; no row starts that would probably end after --seconds. Needs torch, numpy,
safetensors and pillow.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from remixdit.bench.config import BenchConfig
from remixdit.bench.steps import training_variants
from remixdit.bench.timing import Step
from remixdit.bench.trajectories import sampling_variants
from remixdit.diffusion.costs import forward_flops, training_flops
from remixdit.machine import machine

PEAK_FLOPS = 989e12  # dense bfloat16 of an H100, by its data sheet
# Images of a training step: what leaves room for K = 4 bases with their moments in 80 GB. The ends
# first, should time run out.
BATCHES = {"S/2": 256, "XL/2": 64, "B/2": 256, "L/2": 64}
ENDS = ("S/2", "XL/2", "tiny")
TRAJECTORIES = {1: 250, 64: 50}  # images: steps
WARMUP = 3
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One row to measure."""

    kind: str
    """train or sample."""
    config: BenchConfig
    variant: str
    priority: int
    """Rows of a lower number come first."""

    @property
    def pace(self) -> str:
        """What takes about as long: a compilation takes most of the time of a row."""
        return f"{self.kind}, {'compiled' if self.config.compile else 'eager'}"

    def to_json(self) -> Row:
        """Return what tells this row from others, as JSON values."""
        return {
            "kind": self.kind,
            "network": self.config.network,
            "batch_size": self.config.batch_size,
            "compiled": bool(self.config.compile),
            "variant": self.variant,
        }


def jobs(device: str, tiny: bool) -> list[Job]:
    """Return all rows, the most telling first."""
    base = BenchConfig(
        input_size=32, precision="bf16", device=device, experts_per_step=(0, 1), memory=False
    )
    networks = {name: replace(base, network=name, batch_size=BATCHES[name]) for name in BATCHES}
    trajectories = TRAJECTORIES
    if tiny:
        small = replace(base, network="32x2/2", input_size=8, num_experts=5, batch_size=10)
        networks, trajectories = {"tiny": small}, {1: 5, 2: 5}
    found = []
    for name, config in networks.items():
        is_end = name in ENDS
        found += list(training_jobs(config, is_end))
        found += list(sampling_jobs(config, trajectories)) if is_end else []
    return sorted(found, key=lambda job: job.priority)


def training_jobs(config: BenchConfig, is_end: bool) -> Iterator[Job]:
    """Yield the rows of a network: eager ones first, and naive ones last, which are slow."""
    for compiled in (False, True):
        own = replace(config, compile=compiled)
        for name in training_variants(own):
            priority = (1 if is_end else 3) if compiled else 0
            if name.startswith("naive"):
                slow = name == f"naive M={config.num_experts}"
                priority = 5 if slow else 4 if compiled else 0
            yield Job("train", own, name, priority)


def sampling_jobs(config: BenchConfig, trajectories: dict[int, int]) -> Iterator[Job]:
    """Yield the rows of a network's latency."""
    for (size, steps), name in product(trajectories.items(), sampling_variants(config)):
        own = replace(config, batch_size=size, num_inference_steps=steps, compile=False)
        yield Job("sample", own, name, 2)


def measure(job: Job, least_seconds: float) -> Row:
    """Return the figures of a row, or that it did not fit."""
    torch._dynamo.reset()  # shapes of another network would make this one's dynamic
    try:
        if job.kind == "train":
            return training_figures(job, least_seconds)
        return sampling_figures(job)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # one row that fails must not cost the others
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}


def training_figures(job: Job, least_seconds: float) -> Row:
    """Time training steps for at least so long, after the first few."""
    config = job.config
    step = training_variants(config)[job.variant]()
    started = time.perf_counter()
    for index in range(WARMUP):
        step(index)
    synchronize()
    warm = time.perf_counter() - started
    reset_peak()
    seconds = timed(step, least_seconds)
    middle = median(seconds)
    flops = training_flops(config.shape(), config.batch_size)
    return {
        "median_ms": 1000 * middle,
        "range_ms": [1000 * min(seconds), 1000 * max(seconds)],
        "steps": len(seconds),
        "images_per_second": config.batch_size / middle,
        "share_of_peak": flops / middle / PEAK_FLOPS,
        "peak_bytes": peak_bytes(),
        "warmup_seconds": warm,
    }


def sampling_figures(job: Job) -> Row:
    """Time the second of two trajectories."""
    config = job.config
    step = sampling_variants(config)[job.variant]()
    step(0)
    synchronize()
    reset_peak()
    started = time.perf_counter()
    step(1)
    synchronize()
    seconds = time.perf_counter() - started
    flops = config.batch_size * config.num_inference_steps * forward_flops(config.shape())
    return {
        "median_ms": 1000 * seconds,
        "step_ms": 1000 * seconds / config.num_inference_steps,
        "num_inference_steps": config.num_inference_steps,
        "images_per_second": config.batch_size / seconds,
        "share_of_peak": flops / seconds / PEAK_FLOPS,
        "peak_bytes": peak_bytes(),
    }


def timed(step: Step, least_seconds: float, least: int = 3, most: int = 30) -> list[float]:
    """Return the seconds of each step, of as many as fill the time."""
    seconds: list[float] = []
    while len(seconds) < least or (sum(seconds) < least_seconds and len(seconds) < most):
        started = time.perf_counter()
        step(len(seconds))
        synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def collect() -> None:
    """Give the memory of a row back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def with_ratios(rows: list[Row]) -> list[Row]:
    """Return the rows with `remix_over_plain` and `naive_over_remix` where both were measured."""
    times = {key(row): row["median_ms"] for row in rows if "median_ms" in row}
    return [{**row, **ratios(row, times)} for row in rows]


def key(row: Row, variant: str = "") -> tuple[Any, ...]:
    """Return what tells a row, or that of another variant, from all others."""
    shared = ("kind", "network", "batch_size", "compiled")
    return (*(row[name] for name in shared), variant or row["variant"])


def ratios(row: Row, times: dict[tuple[Any, ...], float]) -> Row:
    """Return the ratios of a row of ours."""
    own, name = times.get(key(row)), row["variant"]
    naive = name.replace("remix", "naive") if row["kind"] == "train" else "naive"
    if own is None or name == "plain" or name.startswith("naive"):
        return {}
    found = {}
    if key(row, "plain") in times:
        found["remix_over_plain"] = own / times[key(row, "plain")]
    if key(row, naive) in times:
        found["naive_over_remix"] = times[key(row, naive)] / own
    return found


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "kind": ("", str),
    "network": ("network", str),
    "batch_size": ("batch", str),
    "compiled": ("blocks", lambda value: "compiled" if value else "eager"),
    "variant": ("variant", str),
    "median_ms": ("ms", lambda value: f"{value:.1f}"),
    "step_ms": ("ms a denoising step", lambda value: f"{value:.2f}"),
    "images_per_second": ("images/s", lambda value: f"{value:.4g}"),
    "share_of_peak": ("share of peak", lambda value: f"{value:.1%}"),
    "peak_bytes": ("peak, GB", lambda value: f"{value / 1e9:.1f}"),
    "remix_over_plain": ("over plain", lambda value: f"{value:.3f}"),
    "naive_over_remix": ("naive over it", lambda value: f"{value:.2f}"),
    "error": ("", str),
}


def markdown(facts: Row, rows: list[Row]) -> str:
    """Return the result as a page."""
    lines = [f"# {facts['machine']['device']}, torch {facts['machine']['torch']}", ""]
    lines += [f"`{facts['command']}`, {facts['elapsed_seconds']:.0f} s; medians.", ""]
    lines += [
        f"| {' | '.join(title for title, _ in COLUMNS.values())} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for row in rows:
        cells = (
            show(row[name]) if row.get(name) is not None else ""
            for name, (_, show) in COLUMNS.items()
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", f"Left out for want of time: {facts['left_out'] or 'nothing'}.", ""]
    )


def write(directory: Path, facts: Row, rows: list[Row]) -> None:
    """Write what is known so far."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = with_ratios(rows)
    (directory / "gpu.json").write_text(json.dumps({**facts, "rows": rows}, indent=1), "utf-8")
    (directory / "gpu.md").write_text(markdown(facts, rows), "utf-8")


def run(options: argparse.Namespace, command: str) -> None:
    """Measure row by row, within the time."""
    started = time.perf_counter()
    device = torch.device(options.device)
    if options.tiny:  # whoever tries the code need not wait for a C++ compiler
        torch.compiler.set_default_backend("aot_eager")
    facts: Row = {"machine": machine(device), "command": command, "left_out": 0}
    rows: list[Row] = []
    longest: dict[str, float] = {}
    work = jobs(options.device, options.tiny)
    for number, job in enumerate(work, 1):
        began = time.perf_counter()
        likely = longest.get(job.pace, 30.0 if job.config.compile else 10.0)
        if began - started + likely > options.seconds:
            facts["left_out"] += 1
            continue
        row = {**job.to_json(), **measure(job, options.row_seconds)}
        collect()
        spent = time.perf_counter() - began
        longest[job.pace] = max(longest.get(job.pace, 0.0), spent)
        rows.append({**row, "spent_seconds": spent})
        facts["elapsed_seconds"] = time.perf_counter() - started
        write(options.output, facts, rows)
        said = row.get("error") or f"{row['median_ms']:.1f} ms"
        print(f"{number}/{len(work)} {' '.join(map(str, key(row)))}: {said}", flush=True)
    facts["elapsed_seconds"] = time.perf_counter() - started
    write(options.output, facts, rows)
    print((options.output / "gpu.md").read_text("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="directory of the results")
    parser.add_argument("--seconds", type=float, default=480, help="time after which no row starts")
    parser.add_argument("--row-seconds", type=float, default=1.5, help="timed seconds of a row")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="one network of a few thousand weights")
    options = parser.parse_args()
    run(options, " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
