"""What the loader does with a set of the size of ImageNet: start-up, memory, latents a second.

    python benchmarks/million_latents.py --directory /tmp/million

Makes 1.28 M moments (8, 32, 32) float16 as sparse files, which take no disk but are read like any
other, unless the directory is there already, and prints one JSON object.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from remixdit.data import Loader, ShardDataset
from remixdit.data.shards import shard_file

ROW = (8, 32, 32)
SHARD_SIZE = 5120
NUM_CLASSES = 1000


def make_sparse(directory: Path, num_images: int) -> None:
    directory.mkdir(parents=True)
    counts = [min(SHARD_SIZE, num_images - i) for i in range(0, num_images, SHARD_SIZE)]
    for number, count in enumerate(counts):
        with (directory / shard_file(number)).open("wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": (count, *ROW)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + count * int(np.prod(ROW)) * 2)
    np.save(directory / "class_labels.npy", np.arange(num_images) % NUM_CLASSES)
    index = {
        "format_version": 1,
        "kind": "moments",
        "source": {"name": "zeros", "num_images": num_images, "fingerprint": ""},
        "autoencoder": {"name": "none-of-these-latents-is-real", "scaling_factor": 0.18215},
        "image_size": 256,
        "channels": 3,
        "crop": "center",
        "mirrored": False,
        "latent_shape": [ROW[0] // 2, *ROW[1:]],
        "shape": ROW,
        "dtype": "float16",
        "shard_size": SHARD_SIZE,
        "class_names": [str(label) for label in range(NUM_CLASSES)],
        "num_images": num_images,
        "num_classes": NUM_CLASSES,
        "class_counts": [num_images // NUM_CLASSES] * NUM_CLASSES,
        "class_labels_digest": "",
        "shards": [
            {"num_images": count, "digests": {shard_file(number): ""}}
            for number, count in enumerate(counts)
        ],
        "skipped": [],
    }
    (directory / "index.json").write_text(json.dumps(index))


def memory_mb() -> dict[str, int]:
    """What the process holds of its own, and what of the files the kernel keeps for it."""
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {name: int(fields[name].split()[0]) // 1024 for name in ("RssAnon", "RssFile")}


def measure(directory: Path, batch_size: int, num_batches: int, runs: int) -> dict[str, object]:
    before = memory_mb()["RssAnon"]
    start = time.perf_counter()
    dataset = ShardDataset(directory)
    loader = Loader(dataset, batch_size, seed=0)
    batches = loader.batches(1_000_000, lambda step, batch: batch)
    next(batches)
    first_batch_seconds = time.perf_counter() - start
    anonymous_mb, speeds, cpu = [], [], []
    for _ in range(runs):
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in itertools.islice(batches, num_batches):
            pass
        cpu.append((time.process_time() - cpu_start) / num_batches / batch_size * 1e6)
        speeds.append(num_batches * batch_size / (time.perf_counter() - start))
        anonymous_mb.append(memory_mb()["RssAnon"])
    batches.close()
    return {
        "num_images": len(dataset),
        "num_shards": len(dataset.index["shards"]),
        "seconds_to_first_batch": round(first_batch_seconds, 3),
        "latents_per_second_median": round(statistics.median(speeds)),
        "latents_per_second_range": [round(min(speeds)), round(max(speeds))],
        "cpu_microseconds_per_latent": round(statistics.median(cpu), 1),
        "own_memory_mb_before": before,
        "own_memory_mb_after_each_run": anonymous_mb,
        "mapped_memory_mb": memory_mb()["RssFile"],
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=1_281_167)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--num-batches", type=int, default=400)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    if not arguments.directory.exists():
        make_sparse(arguments.directory, arguments.num_images)
    result = measure(
        arguments.directory, arguments.batch_size, arguments.num_batches, arguments.runs
    )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
