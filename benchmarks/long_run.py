"""Whether a long run stays as it begins: memory, descriptors, threads and time a step.

    python benchmarks/long_run.py --directory /tmp/long --figure docs/pictures/long-run.png

Trains the preset `tiny` on noise as a child process, with a checkpoint every 10 steps, TensorBoard,
and samples every 1,000 steps. After every 500 steps it reads of /proc what the process holds.
Prints one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from remixdit.figures.plots import COLORS, MAX_WIDTH, save
from remixdit.training.run import read_metrics

OPTIONS = "--tensorboard --sample-every 1000 --sample-images 4 --sample-inference-steps 5"
# What is measured: the field of a reading, and its name on the axis.
PANELS = {
    "memory_mb": "memory, MB",
    "descriptors": "descriptors",
    "threads": "threads",
    "cpu_ms_per_step": "CPU time\na step, ms",
}


def start(directory: Path, steps: int) -> "subprocess.Popen[bytes]":
    """Start the run."""
    directory.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (512, 16, 16, 3), dtype=np.uint8)
    np.savez(directory / "noise.npz", arr_0=pixels, arr_1=np.arange(512) % 8)
    line = f"train tiny --data {directory}/noise.npz --output-dir {directory}/run --steps {steps}"
    with (directory / "stderr.txt").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "remixdit", *f"{line} {OPTIONS}".split()],
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def reading(pid: int) -> dict[str, float]:
    """Return what a process holds, and the seconds of CPU time that it has had."""
    place = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
    times = (place / "stat").read_text().rpartition(")")[2].split()
    return {
        "memory_mb": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "descriptors": len(list((place / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "cpu_seconds": (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
    }


def readings(directory: Path, child: "subprocess.Popen[bytes]", every: int) -> Iterator[dict]:
    """Yield a reading after every so many steps, with the time that each of them took.

    The last step has none: the threads end with it.
    """
    before: dict | None = None
    while child.poll() is None:
        time.sleep(0.2)
        rows = read_metrics(directory / "run")
        step = rows[-1]["step"] if rows else 0
        if step // every <= (before["step"] // every if before else 0):
            continue
        try:
            now = {"step": step, "seconds": time.monotonic(), **reading(child.pid)}
        except OSError:  # it has just ended
            return
        if (directory / "run" / "model").exists():
            return
        if before:
            taken = step - before["step"]
            for name, unit in (("ms_per_step", "seconds"), ("cpu_ms_per_step", "cpu_seconds")):
                now[name] = round(1000 * (now[unit] - before[unit]) / taken, 2)
            yield {name: value for name, value in now.items() if "seconds" not in name}
        before = now


def figure_of(rows: list[dict]) -> Figure:
    """Draw one panel for each of what was measured, from zero on."""
    figure = Figure(figsize=(MAX_WIDTH, 7), dpi=150, layout="constrained")
    panels = figure.subplots(len(PANELS), 1, sharex=True)
    steps = [row["step"] for row in rows]
    for axes, (field, name) in zip(panels, PANELS.items(), strict=True):
        values = [row[field] for row in rows]
        axes.plot(steps, values, color=COLORS[0], linewidth=2)
        axes.set_ylim(0, 1.2 * max(values))
        axes.set_ylabel(name)
        axes.grid(axis="y", alpha=0.3)
    panels[-1].set_xlabel("step")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=500)
    arguments = parser.parse_args()
    child = start(arguments.directory, arguments.steps)
    rows = []
    for row in readings(arguments.directory, child, arguments.every):
        print(row, file=sys.stderr)
        rows.append(row)
    result = {"code": child.wait(), "steps": arguments.steps, "torch": torch.__version__}
    print(json.dumps({**result, "readings": rows}, indent=1))
    if arguments.figure:
        save(figure_of(rows), arguments.figure)


if __name__ == "__main__":
    main()
