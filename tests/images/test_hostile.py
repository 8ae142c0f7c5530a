"""Whatever a file holds, reading it ends in pictures, a ValueError or an OSError, and soon."""

import io
import json
import os
import random
import resource
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, features

from remixdit.data import EncodeConfig, ShardDataset, encode, open_source
from remixdit.images.source import Source

SECONDS, MEGABYTES = 10, 2000  # what no single file may take more of
SUFFIXES = ("jpg", "png", "webp", "gif", "bmp", "tiff", "ppm", "jp2", "npz", "tar", "parquet")


def picture(seed: int, suffix: str) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    kind = {"jpg": "JPEG", "jp2": "JPEG2000"}.get(suffix, suffix.upper())
    image = Image.fromarray(pixels)
    image.save(file, kind, **({"exif": exif} if suffix in ("jpg", "png", "webp") else {}))
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def tar(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def parquet(labels: list | pa.Array, metadata: object = None, column: str = "image") -> bytes:
    rows = [{"bytes": picture(seed, "png"), "path": None} for seed in range(len(labels))]
    table = pa.table({column: rows, "label": labels})
    if metadata is not None:
        text = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
        table = table.replace_schema_metadata({"huggingface": text})
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def whole(suffix: str) -> bytes:
    """A small file of each kind."""
    if suffix == "npz":
        return npz(arr_0=np.zeros((3, 16, 16, 3), np.uint8), arr_1=np.arange(3))
    if suffix == "tar":
        return tar({"1.png": picture(0, "png"), "1.cls": b"1", "2.json": b'{"label": 0}'})
    if suffix == "parquet":
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a"]}}
        return parquet([0, 0, 0], {"info": {"features": features}})
    return picture(0, suffix)


def mutated(content: bytes, draws: random.Random) -> bytes:
    """Return a file with a few bytes changed, cut out, repeated, or numbers made enormous."""
    damaged = bytearray(content)
    for _ in range(draws.randint(1, 6)):
        place = draws.randrange(len(damaged) + 1)
        match draws.randrange(6):
            case 0:
                damaged[place : place + 1] = bytes([draws.randrange(256)])
            case 1:
                damaged[place : place + 4] = draws.choice(
                    [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0"]
                )
            case 2:
                del damaged[place : place + draws.randint(1, 40)]
            case 3:
                damaged[place:place] = damaged[place : place + draws.randint(1, 40)]
            case 4:
                damaged[place : place + 1] = bytes([1 << draws.randrange(8)])
            case 5 if draws.random() < 0.3:
                del damaged[place:]
    return bytes(damaged)


def written(directory: Path, suffix: str, content: bytes) -> Path:
    """Write a file where it is opened as data; a picture is the only one of a folder."""
    if suffix in ("npz", "tar", "parquet"):
        path = directory / f"a.{suffix}"
        path.write_bytes(content)
        return path
    (directory / "photos").mkdir(exist_ok=True)
    (directory / "photos" / f"a.{suffix}").write_bytes(content)
    return directory / "photos"


def read_all(source: Source) -> None:
    """Read up to eight pictures, as an encoding does."""
    _ = source.channels
    reasons: list[str] = []
    for index in range(min(len(source), 8)):
        try:
            source.load(index)
        except ValueError as error:
            reasons.append(str(error))
    assert all(reasons), "a skipped image needs its reason"


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bounded(read: Callable[[], object], case: object) -> None:
    """Read; only ValueError and OSError may come out, within the bounds."""
    started, before = time.monotonic(), peak_megabytes()
    try:
        read()
    except (ValueError, OSError):
        pass
    except BaseException as error:
        raise AssertionError(f"{case}: {error!r}") from error
    assert time.monotonic() - started < SECONDS, case
    assert peak_megabytes() - before < MEGABYTES, case


def try_files(directory: Path, seconds: float, seed: int) -> int:
    """Damage files of every kind in turn until the time is over; return how many."""
    originals = {suffix: whole(suffix) for suffix in SUFFIXES}
    if features.check("avif"):
        originals["avif"] = picture(0, "avif")
    end, tried = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for suffix, content in originals.items():
            damaged = mutated(content, random.Random(f"{seed} {tried} {suffix}"))
            path = written(directory, suffix, damaged)
            bounded(lambda path=path: read_all(open_source(path)), (seed, tried, suffix))
            if path.is_dir():
                (path / f"a.{suffix}").unlink()
        tried += 1
    return tried * len(originals)


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_or_read(tmp_path):
    assert try_files(tmp_path, seconds=3, seed=0) > 100


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_or_read_for_ten_minutes(tmp_path):
    minutes = float(os.environ.get("FUZZ_MINUTES", "10"))
    print(try_files(tmp_path, 60 * minutes, seed=time.time_ns()), "files")


def lying_npz() -> bytes:
    """An .npy header that promises 10^12 images."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 16, 16, 3)}
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue())
    return file.getvalue()


def cut_npz() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(
            "arr_0.npy", b"\x93NUMPY\1\0" + struct.pack("<H", 20) + b"{'shape': (((([[[[ "
        )
    return file.getvalue()


DEEP = b"[" * 100_000
PIXELS = np.zeros((3, 16, 16, 3), np.uint8)
REFUSED = {
    "lying.npz": (lying_npz, r"arr_0.npy must hold \d+ bytes"),
    "cut.npz": (cut_npz, r"its .npy header cannot be read"),
    "huge.npz": (
        lambda: npz(arr_0=PIXELS, arr_1=np.array([0, 1, 10**9])),
        "got 1000000000: number",
    ),
    "floats.npz": (lambda: npz(arr_0=PIXELS, arr_1=np.zeros(3)), r"must be \(3,\) integers, got"),
    "short.npz": (lambda: npz(arr_0=PIXELS, arr_1=np.zeros(2, int)), r"must be \(3,\) integers"),
    "empty.npz": (lambda: npz(arr_0=np.zeros((3, 0, 0, 3), np.uint8)), r"must be \(n, H, W, 3\)"),
    "huge.tar": (lambda: tar({"1.png": b"", "1.cls": b"1000000000"}), "below 1000 for 1 images"),
    "vast.tar": (lambda: tar({"1.png": b"", "1.cls": b"9" * 30}), "a label in"),
    "deep.tar": (lambda: tar({"1.png": b"", "1.json": DEEP}), "must hold a label as an integer"),
    "huge.parquet": (lambda: parquet([0, 1, 10**9]), "got 1000000000: number the classes"),
    "bool.parquet": (lambda: parquet([True, False]), "labels must be integers or strings"),
    "list.parquet": (lambda: parquet([[1], [2]]), "labels must be integers or strings"),
    "metadata.parquet": (lambda: parquet([0], []), "the metadata of the hub make no sense"),
    "deep.parquet": (lambda: parquet([0], DEEP), "the metadata of the hub make no sense"),
    "names.parquet": (
        lambda: parquet([0], {"info": {"features": {"label": {"names": [1, None]}}}}),
        "names of the classes must be a list of texts",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_data_are_refused_by_name(tmp_path, name):
    make, message = REFUSED[name]
    (tmp_path / name).write_bytes(make())
    before = peak_megabytes()
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / name)
    assert peak_megabytes() - before < 200


def test_rows_in_columns_are_the_same_pictures(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", np.asfortranarray(pixels))
    assert np.array_equal(np.asarray(open_source(tmp_path / "a.npz").load(1)[0]), pixels[1])


def test_nothing_of_a_tar_that_climbs_is_written_or_read(tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(1, "png"))
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w") as archive:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../secret.png"
            archive.addfile(info)
        info = tarfile.TarInfo("../../climbs.png")
        info.size = len(content := picture(2, "png"))
        archive.addfile(info, io.BytesIO(content))
    source = open_source(tmp_path / "in" / "a.tar")
    assert list(source.image_names) == ["a.tar:../../climbs.png"]
    source.load(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "secret.png"]


def test_a_pipe_and_a_device_among_pictures_are_skipped(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "good.png").write_bytes(picture(0, "png"))
    os.mkfifo(photos / "pipe.png")
    (photos / "zero.png").symlink_to("/dev/zero")
    list(encode(open_source(photos), tmp_path / "out", EncodeConfig(image_size=16)))
    skipped = ShardDataset(tmp_path / "out").index["skipped"]
    assert {found["image"]: found["reason"] for found in skipped} == dict.fromkeys(
        ("pipe.png", "zero.png"), "it is no regular file"
    )


def test_a_row_of_the_hub_reads_no_file_of_this_machine(tmp_path):
    from remixdit.images.tables import DatasetReader

    (tmp_path / "secret.png").write_bytes(picture(0, "png"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "cache" / "own.png").write_bytes(b"own")
    paths = ["/dev/zero", f"{tmp_path}/secret.png", f"{tmp_path}/cache/../secret.png"]
    paths += [f"{tmp_path}/cache/link.png", f"{tmp_path}/cache/own.png"]
    table = [{"image": {"bytes": None, "path": path}} for path in paths]
    reader = DatasetReader(table, "image", (tmp_path / "cache",))
    for row in range(4):
        with pytest.raises(ValueError, match="the row names a file that was not downloaded"):
            reader(row)
    assert reader(4) == b"own"


def test_a_relabelled_parquet_file_of_equal_size_is_other_data(tmp_path):
    made = []
    for number, labels in enumerate([[0, 1, 0], [1, 0, 0]]):
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / "a.parquet"
        path.write_bytes(parquet(pa.array(labels, pa.int64())))
        made.append(open_source(path))
    assert made[0].fingerprint != made[1].fingerprint
    assert made[0].earlier_fingerprint
    list(encode(made[0], tmp_path / "out", EncodeConfig(image_size=16)))
    with pytest.raises(ValueError, match="holds another encoding: its source is"):
        list(encode(made[1], tmp_path / "out", EncodeConfig(image_size=16)))
    path = tmp_path / "out" / "index.json"  # as it was before labels counted
    index = json.loads(path.read_text())
    index["source"]["fingerprint"] = made[0].earlier_fingerprint
    path.write_text(json.dumps(index))
    list(encode(made[0], tmp_path / "out", EncodeConfig(image_size=16)))
