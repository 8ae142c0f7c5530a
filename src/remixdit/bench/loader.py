"""How fast the loader is."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from remixdit.bench.timing import Timing
from remixdit.data import Loader, ShardDataset
from remixdit.machine import machine

__all__ = ["LoaderConfig", "bench_loader"]


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """A loader to time."""

    shards: str
    """Directory of shards."""
    batch_size: int = 256
    """Images in a batch."""
    steps: int = 100
    """Number of timed batches, after a tenth as many that warm up."""


def bench_loader(config: LoaderConfig) -> dict[str, Any]:
    """Time batches as training gets them: shuffled, and made ahead in a thread."""
    loader = Loader(ShardDataset(config.shards), config.batch_size)
    batches = loader.batches(0, lambda step, batch: batch)
    for _ in range(1 + config.steps // 10):
        batch = next(batches)
    seconds = []
    for _ in range(config.steps):
        started = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - started)
    latents_per_second = config.batch_size * config.steps / sum(seconds)
    return {
        "config": asdict(config),
        "machine": machine(torch.device("cpu")),
        "variants": {"batch": Timing("batch", tuple(seconds)).to_json()},
        "latents_per_second": latents_per_second,
        "bytes_per_second": latents_per_second * batch.latents.nbytes / config.batch_size,
    }
