"""What this machine does: a training step and a trajectory, ours beside plain and naive."""

from remixdit.bench.config import BenchConfig
from remixdit.bench.loader import LoaderConfig, bench_loader
from remixdit.bench.sampling import bench_sampling
from remixdit.bench.timing import Timing, Under
from remixdit.bench.training import bench_training

__all__ = [
    "BenchConfig",
    "LoaderConfig",
    "Timing",
    "Under",
    "bench_loader",
    "bench_sampling",
    "bench_training",
]
