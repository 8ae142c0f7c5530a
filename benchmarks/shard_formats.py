"""Which file format serves random rows of latents fastest?

    python benchmarks/shard_formats.py --directory /tmp/formats

Writes the same rows (8, 32, 32) float16 in each format, then gathers shuffled batches of 256 into
one array, with the files in the page cache and without. Prints a Markdown table.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors import safe_open
from safetensors.numpy import save_file

ROW = (8, 32, 32)
SHARD_SIZE = 4096
BATCH_SIZE = 256
Gather = Callable[[np.ndarray, np.ndarray], None]  # rows of one shard, (B, *ROW) to fill


def write_npy(path: Path, rows: np.ndarray) -> None:
    np.save(path.with_suffix(".npy"), rows)


def open_npy(path: Path) -> Gather:
    stored = np.load(path.with_suffix(".npy"), mmap_mode="r").view(np.ndarray)
    return lambda rows, out: np.take(stored, rows, axis=0, out=out, mode="clip")


def open_npy_by_position(path: Path) -> Gather:
    file = path.with_suffix(".npy").open("rb", buffering=0)
    first_byte = np.load(path.with_suffix(".npy"), mmap_mode="r").offset
    row_bytes = 2 * int(np.prod(ROW))
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def gather(rows: np.ndarray, out: np.ndarray) -> None:
        starts = (first_byte + rows * row_bytes).tolist()
        for start in starts:
            os.posix_fadvise(file.fileno(), start, row_bytes, os.POSIX_FADV_WILLNEED)
        for i, start in enumerate(starts):
            os.preadv(file.fileno(), [out[i].data], start)

    return gather


def write_safetensors(path: Path, rows: np.ndarray) -> None:
    save_file({"moments": rows}, path.with_suffix(".safetensors"))


def open_safetensors(path: Path) -> Gather:
    moments = safe_open(path.with_suffix(".safetensors"), "np").get_slice("moments")

    def gather(rows: np.ndarray, out: np.ndarray) -> None:
        for i, row in enumerate(rows):
            out[i] = moments[int(row)]

    return gather


def open_safetensors_mapped(path: Path) -> Gather:
    path = path.with_suffix(".safetensors")
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        shape = json.loads(file.read(header_bytes))["moments"]["shape"]
    stored = np.memmap(path, np.float16, "r", 8 + header_bytes, tuple(shape)).view(np.ndarray)
    return lambda rows, out: np.take(stored, rows, axis=0, out=out, mode="clip")


def write_arrow(path: Path, rows: np.ndarray) -> None:
    row_bytes = rows[0].nbytes
    kind = pa.binary(row_bytes)
    array = pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, pa.py_buffer(rows)])
    table = pa.table({"moments": array})
    with pa.ipc.new_file(str(path.with_suffix(".arrow")), table.schema) as writer:
        writer.write_table(table)


def open_arrow(path: Path) -> Gather:
    column = pa.ipc.open_file(pa.memory_map(str(path.with_suffix(".arrow")))).read_all()["moments"]
    array = column.chunk(0)

    def gather(rows: np.ndarray, out: np.ndarray) -> None:
        taken = array.take(pa.array(rows)).buffers()[1]
        out[:] = np.frombuffer(taken, np.float16).reshape(out.shape)

    return gather


FORMATS = {
    "npy, memory-mapped": (write_npy, open_npy),
    "npy, read by position, announced": (write_npy, open_npy_by_position),
    "safetensors, get_slice": (write_safetensors, open_safetensors),
    "safetensors, mapped by hand": (write_safetensors, open_safetensors_mapped),
    "Arrow file, take": (write_arrow, open_arrow),
}


def batches(num_rows: int, num_batches: int) -> Iterator[np.ndarray]:
    draws = np.random.default_rng(0)
    for _ in range(num_batches):
        yield draws.integers(0, num_rows, BATCH_SIZE)


def rows_per_second(shards: list[Gather], num_rows: int, num_batches: int) -> float:
    """Gather batches, shard by shard."""
    out = np.empty((BATCH_SIZE, *ROW), np.float16)
    start = time.perf_counter()
    for indices in batches(num_rows, num_batches):
        indices.sort()
        numbers = indices // SHARD_SIZE
        ends = np.searchsorted(numbers, np.unique(numbers), side="right")
        for first, end in zip([0, *ends[:-1]], ends, strict=True):
            shards[numbers[first]](indices[first:end] % SHARD_SIZE, out[first:end])
    return num_batches * BATCH_SIZE / (time.perf_counter() - start)


def forget(directory: Path) -> None:
    """Drop the files from the page cache."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(name: str, directory: Path, num_shards: int, runs: int) -> str:
    write, open_shard = FORMATS[name]
    directory.mkdir(parents=True)
    paths = [directory / f"{number:05d}" for number in range(num_shards)]
    start = time.perf_counter()
    for number, path in enumerate(paths):
        draws = np.random.default_rng(number).integers(0, 1 << 14, (SHARD_SIZE, *ROW), np.uint16)
        write(path, draws.view(np.float16))
    write_seconds = time.perf_counter() - start
    start = time.perf_counter()
    shards = [open_shard(path) for path in paths]
    open_ms = (time.perf_counter() - start) * 1000 / num_shards
    num_rows = num_shards * SHARD_SIZE
    rows_per_second(shards, num_rows, 800)  # into the page cache
    warm = statistics.median(rows_per_second(shards, num_rows, 200) for _ in range(runs))
    del shards
    forget(directory)
    cold = rows_per_second([open_shard(path) for path in paths], num_rows, 30)
    return f"| {name} | {open_ms:.2f} | {warm:,.0f} | {cold:,.0f} | {write_seconds:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--num-shards", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    print("| format | open, ms a shard | rows/s, cached | rows/s, not cached | write, s |")
    print("|---|---|---|---|---|")
    for number, name in enumerate(FORMATS):
        directory = arguments.directory / str(number)
        print(measure(name, directory, arguments.num_shards, arguments.runs), flush=True)


if __name__ == "__main__":
    main()
