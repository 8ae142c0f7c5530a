"""A folder of class folders: `photos/cat/1.jpg`, `photos/dog/old/2.png`, ...

The class of an image is the first folder below the root; what lies deeper belongs to it. Images
directly in the root carry no label. Order is by code point of the normalised (NFC) names, so it is
the same on every platform.
"""

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from remixdit.images.source import (
    UNLABELLED,
    Source,
    collection_name,
    fingerprint,
    regular_file_bytes,
)

__all__ = ["FileReader", "folder_source"]

SPLIT_NAMES = frozenset({"train", "training", "test", "val", "valid", "validation"})


@dataclass(frozen=True)
class FileReader:
    """Reads image i of a list of files."""

    root: Path
    relative_paths: tuple[str, ...]

    def __call__(self, index: int) -> bytes:
        """Return the content of a file."""
        return regular_file_bytes(self.root / self.relative_paths[index])


def folder_source(root: Path, split: str | None) -> Source:
    """Open a folder of class folders, or of images without labels."""
    root = _split_folder(root, split)
    paths = sorted(_image_paths(root), key=_sort_key)
    if not paths:
        raise ValueError(f"{root} holds no images")
    class_names, class_labels = _classes(root, paths)
    sizes = [_file_bytes(root / path) for path in paths]
    return Source(
        name=collection_name(root),
        image_names=paths,
        class_labels=class_labels,
        class_names=class_names,
        fingerprint=fingerprint(
            f"{_normal(p)} {size}" for p, size in zip(paths, sizes, strict=True)
        ),
        read=FileReader(root, tuple(paths)),
    )


def _split_folder(root: Path, split: str | None) -> Path:
    if split is not None:
        if not (root / split).is_dir():
            raise ValueError(f"split must be a folder of {root}, got {split!r}")
        return root / split
    folders = [entry.name for entry in root.iterdir() if _is_shown(entry.name) and entry.is_dir()]
    if folders and SPLIT_NAMES.issuperset(name.lower() for name in folders):
        raise ValueError(f"{root} holds splits ({', '.join(sorted(folders))}): choose one by split")
    return root


def _classes(root: Path, paths: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the class names and the label of each path."""
    folders = [path.split("/", 1)[0] if "/" in path else None for path in paths]
    names = sorted({folder for folder in folders if folder is not None}, key=_sort_key)
    if not names:
        return (), np.full(len(paths), UNLABELLED, np.int64)
    _check_class_folders(root, names, first_loose=next((p for p in paths if "/" not in p), None))
    label_of = {name: label for label, name in enumerate(names)}
    labels = [label_of[folder] for folder in folders if folder is not None]
    return tuple(_normal(name) for name in names), np.array(labels, np.int64)


def _check_class_folders(root: Path, names: list[str], first_loose: str | None) -> None:
    if first_loose is not None:
        raise ValueError(f"{root} holds class folders and the loose image {first_loose}")
    if len(names) == 1:
        # Nearly always one level too high, and a single label carries no information.
        raise ValueError(
            f"{root} holds the one class folder {names[0]!r}: give {root / names[0]} instead"
        )
    shown = {entry.name for entry in root.iterdir() if _is_shown(entry.name) and entry.is_dir()}
    empty = sorted(shown.difference(names))
    if empty:
        raise ValueError(f"class folder {empty[0]!r} of {root} holds no images")
    seen: dict[str, str] = {}
    for name in names:
        twin = seen.setdefault(_normal(name).casefold(), name)
        if twin != name:
            raise ValueError(f"class folders {twin!r} and {name!r} of {root} differ only by case")


def _image_paths(root: Path) -> Iterator[str]:
    """Yield the paths of all images below root, relative to it, with / between folders."""
    folders = [("", {_identity(root): "."})]  # each with the folders it lies in
    while folders:
        folder, above = folders.pop()
        with os.scandir(root / folder) as found:
            entries = [entry for entry in found if _is_shown(entry.name)]
        for entry in entries:
            path = folder + entry.name
            if _is_folder(entry):
                folders.append((f"{path}/", {**above, _checked(root, path, above): path}))
            elif Path(entry.name).suffix.lower() in _suffixes():
                yield path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink():
        return Path(entry.path).is_dir()  # False, not an error, for a link that leads nowhere
    return entry.is_dir()


def _checked(root: Path, path: str, above: dict[tuple[int, int], str]) -> tuple[int, int]:
    identity = _identity(root / path)
    if identity in above:
        raise ValueError(
            f"{root / path} links back to {root / above[identity]}: a loop of symbolic links"
        )
    return identity


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1  # a broken link: it is listed, and skipped by name when it is read


@cache
def _suffixes() -> frozenset[str]:
    Image.init()  # loads every format; Pillow alone starts with five
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN
    )


def _is_shown(name: str) -> bool:
    return not name.startswith((".", "__MACOSX"))


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _sort_key(path: str) -> tuple[str, str]:
    return _normal(path), path
