"""How much memory a variant takes at most, measured in a process of its own.

On a GPU torch counts what it has handed out. On a CPU the system counts the pages that the process
holds: its peak while a step runs, less what it held before the model was built. What a library or a
compiler takes the first time is out of the way by then, as a tiny variant has run; and large
blocks go straight back to the system, so that freed memory does not count.
"""

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import torch

from remixdit import distributed
from remixdit.bench.config import BenchConfig
from remixdit.bench.steps import Builder, training_variants
from remixdit.bench.trajectories import sampling_variants
from remixdit.machine import (
    can_reset_peak,
    peak_resident_bytes,
    reset_peak_resident,
    resident_bytes,
)

__all__ = ["VARIANTS", "peak_bytes"]

# Of glibc: blocks from this size on have pages of their own, which are given back at once.
OWN_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "THP_MEM_ALLOC_ENABLE": "0",  # torch's pages of 2 MB would round the figure up
}
VARIANTS = {"train": training_variants, "sample": sampling_variants}


def peak_bytes(config: BenchConfig, what: str, name: str) -> int | None:
    """Return the peak of one variant beyond the interpreter and its libraries.

    Args:
        config: Of the benchmark.
        what: "train" or "sample".
        name: Of the variant.

    Returns:
        Bytes, or None where the system does not say.
    """
    if distributed.pick_device(config.device).type == "cpu" and not can_reset_peak():
        return None
    request = json.dumps({"config": asdict(config), "what": what, "name": name})
    done = subprocess.run(
        [sys.executable, "-c", "from remixdit.bench.peak import main; main()", request],
        env={**os.environ, **OWN_PAGES},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


def measure(config: BenchConfig, what: str, name: str) -> int:
    """Return the peak of a variant that this process has not run yet."""
    device = distributed.pick_device(config.device)
    # A trajectory that mixes every expert once takes as much as a longer one.
    steps = min(config.num_inference_steps, config.num_experts)
    config = replace(config, num_inference_steps=steps)
    build = VARIANTS[what](config)[name]
    if device.type == "cuda":
        return peak_on_gpu(build)
    tiny = replace(config, network="64x2/2", input_size=4)
    run(VARIANTS[what](tiny)[name])
    gc.collect()
    before = resident_bytes()
    return run(build) - before


def run(build: Builder) -> int:
    """Run a few steps; return the peak of resident memory in the last."""
    step = build()
    for index in range(2):  # compiles, and touches all that it keeps
        step(index)
    gc.collect()
    reset_peak_resident()
    step(2)
    return peak_resident_bytes()


def peak_on_gpu(build: Builder) -> int:
    """Return the most bytes that torch had handed out during a step."""
    step = build()
    for index in range(2):
        step(index)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step(2)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    """Measure what the first argument asks for; the last word printed is the number of bytes."""
    request = json.loads(sys.argv[1])
    values: dict[str, Any] = request["config"]
    values["experts_per_step"] = tuple(values["experts_per_step"])
    print(measure(BenchConfig(**values), request["what"], request["name"]))
