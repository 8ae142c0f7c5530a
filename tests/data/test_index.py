"""An index.json from anywhere is checked once, before anything is taken from it."""

import copy
import json
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from remixdit.data import EncodeConfig, ShardDataset, encode, open_source
from remixdit.data.check import check
from remixdit.progress import finish

VALUES = [None, -1, 0, 1.5, 10**9, 10**30, True, "", "../../x", "/etc/passwd", [], {}, [[]], [None]]


@pytest.fixture
def shards(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", pixels, np.arange(10) % 3)
    config = EncodeConfig(image_size=16, shard_size=4)
    list(encode(open_source(tmp_path / "a.npz"), tmp_path / "out", config))
    return tmp_path / "out"


def read_all(directory: Path) -> None:
    dataset = ShardDataset(directory)
    dataset.check_files()
    zeros = np.zeros(len(dataset), np.int64)
    dataset.read(np.arange(len(dataset)), zeros, 0)


def write_index(directory: Path, index: object) -> None:
    (directory / "index.json").write_text(json.dumps(index))


def index_of(directory: Path) -> dict:
    return json.loads((directory / "index.json").read_text())


def test_every_missing_field_is_named(shards):
    index = index_of(shards)
    for name in index:
        write_index(shards, {key: value for key, value in index.items() if key != name})
        with pytest.raises(ValueError, match=rf"index.json.*{name}"):
            ShardDataset(shards)


def test_every_field_of_every_wrong_value_is_refused_or_read(shards):
    index = index_of(shards)
    for name, before in index.items():
        for value in VALUES:
            write_index(shards, {**index, name: value})
            try:
                read_all(shards)
            except ValueError:
                continue
            assert type(value) is type(before), (name, value)


REFUSED = {
    "unknown": ({"depth": 10**9}, "'depth' is unknown"),
    "no shards": ({"shards": []}, "num_images must be 0, got 10"),
    "climbing": (
        {"shards": [{"num_images": 10, "digests": {"../../secret.npy": "0"}}], "shard_size": 10},
        r"shards\[0\].digests must be of latents-00000.npy, got \['../../secret.npy'\]",
    ),
    "negative": ({"image_size": -16}, r"image_size must lie in \[1, 65536\], got -16"),
    "enormous": ({"shape": [3, 10**9, 16]}, r"shape must lie in \[1, 65536\], got 1000000000"),
    "autoencoder": (
        {"autoencoder": {"name": "../../weights"}},
        "autoencoder.name must be none, a path or owner/name, got '../../weights'",
    ),
    "infinite": (
        {"autoencoder": {"name": "none", "scaling_factor": float("inf")}},
        "autoencoder.scaling_factor must be a finite number, got inf",
    ),
    "dtype": ({"dtype": "object"}, "dtype must be uint8, got 'object'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_index_out_of_bounds_is_refused_by_its_field(shards, name):
    changes, message = REFUSED[name]
    write_index(shards, {**index_of(shards), **changes})
    with pytest.raises(ValueError, match=message):
        ShardDataset(shards)


def test_json_a_hundred_thousand_deep_is_refused(shards):
    (shards / "index.json").write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match="is no index of shards"):
        ShardDataset(shards)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["latents-00001.npy", "class_labels.npy", "index.json"])
def test_a_pipe_in_the_place_of_a_file_is_refused(shards, name):
    (shards / name).unlink()
    os.mkfifo(shards / name)
    with pytest.raises(ValueError, match=rf"{name}.* it is no regular file"):
        read_all(shards)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\1\0v\0{'descr", b"\x80\4pickle"])
def test_a_cut_header_is_refused(shards, content):
    (shards / "latents-00000.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"latents-00000.npy cannot be read"):
        read_all(shards)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(10), r"must be \(10,\) int64, got \(10,\) float64"),
        (np.zeros(9, np.int64), r"must be \(10,\) int64, got \(9,\) int64"),
        (np.full(10, 4), r"must lie in \[0, 3\], got 4"),
        (np.full(10, -1), r"must lie in \[0, 3\], got -1"),
        (np.array([{}] * 10, dtype=object), "it holds Python objects"),
    ],
)
def test_labels_of_another_kind_are_refused(shards, labels, message):
    np.save(shards / "class_labels.npy", labels, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_all(shards)
    assert finish(check(shards)).problems


def test_labels_cut_short_under_a_run_do_not_matter(shards):
    """They were mapped into memory, and reading past the end killed the process (SIGBUS)."""
    dataset = ShardDataset(shards)
    dataset.check_files()
    os.truncate(shards / "class_labels.npy", 0)
    assert dataset.class_labels.tolist() == [i % 3 for i in range(10)]


def test_a_shard_cut_short_under_a_run_is_an_error_of_the_machine(shards):
    dataset = ShardDataset(shards)
    dataset.check_files()
    os.truncate(shards / "latents-00000.npy", 200)
    with pytest.raises(OSError, match=r"latents-00000.npy ends in the middle of row 1"):
        dataset.rows(np.array([1]))


def try_indices(directory: Path, seconds: float, seed: int) -> int:
    """Put wrong values at random places of an index until the time is over."""
    original, end, tried = (directory / "index.json").read_text(), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        draws, index = random.Random(f"{seed} {tried}"), json.loads(original)
        for _ in range(draws.randint(1, 3)):
            place = index
            while isinstance(place, dict | list) and place:
                key = draws.choice(list(place) if isinstance(place, dict) else range(len(place)))
                if draws.random() < 0.4 or not isinstance(place[key], dict | list):
                    place[key] = copy.deepcopy(draws.choice(VALUES))
                    break
                place = place[key]
        write_index(directory, index)
        started = time.monotonic()
        try:
            read_all(directory)
        except (ValueError, OSError):
            pass
        except BaseException as error:
            raise AssertionError(f"{seed} {tried} {index}: {error!r}") from error
        assert time.monotonic() - started < 10, index
        tried += 1
    return tried


def test_a_damaged_index_is_refused_or_read(shards):
    assert try_indices(shards, seconds=2, seed=0) > 100


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_damaged_index_is_refused_or_read_for_ten_minutes(shards):
    minutes = float(os.environ.get("FUZZ_MINUTES", "10"))
    print(try_indices(shards, 60 * minutes, seed=time.time_ns()), "indices")
