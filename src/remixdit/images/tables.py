"""Parquet files in the layout of the Hugging Face hub, and `datasets` themselves.

An image column holds `struct<bytes, path>` or plain bytes. Its name and the names of the classes
come from the schema's "huggingface" metadata, where there is any.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from remixdit.images.source import (
    UNLABELLED,
    Source,
    collection_name,
    fingerprint,
    numbered_class_names,
    regular_file_bytes,
)

__all__ = ["hub_source", "parquet_source"]

IMAGE_COLUMNS = ("image", "img", "jpg", "png")
NUM_KEPT_GROUPS = 4
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")


@dataclass
class ParquetReader:
    """Reads image i of several Parquet files, one row group at a time."""

    paths: tuple[Path, ...]
    column: str
    first_rows: np.ndarray  # (G + 1,) global row at which each row group starts
    groups: tuple[tuple[int, int], ...]  # (G,) file and group inside it
    _latest: dict[int, Any] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def __call__(self, index: int) -> bytes:
        group = int(np.searchsorted(self.first_rows, index, side="right")) - 1
        row = self._column(group)[index - int(self.first_rows[group])].as_py()
        encoded = row.get("bytes") if isinstance(row, dict) else row
        if not isinstance(encoded, bytes):
            raise ValueError("the row holds no image bytes")
        return encoded

    def _column(self, group: int) -> Any:
        # Several threads read ahead around the end of a group: keep more than the latest.
        with self._lock:
            if group not in self._latest:
                while len(self._latest) >= NUM_KEPT_GROUPS:
                    del self._latest[next(iter(self._latest))]
                self._latest[group] = self._read_group(*self.groups[group])
            return self._latest[group]

    def _read_group(self, file: int, group: int) -> Any:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.paths[file]) as parquet:
            return parquet.read_row_group(group, columns=[self.column])[self.column]


def parquet_source(path: Path, split: str | None) -> Source:
    """Open a Parquet file, or a folder of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root, paths = _parquet_files(path, split)
    try:
        schemas = [pq.read_schema(file) for file in paths]
        metadata = [pq.read_metadata(file) for file in paths]
        columns = _columns(paths[0], schemas[0])
        for file, schema in zip(paths, schemas, strict=True):
            _check_columns(file, schema, columns)
        labels, class_names = _labels(paths, columns[1], _features(schemas[0]))
    except (pa.ArrowException, MemoryError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    rows = [m.row_group(g).num_rows for m in metadata for g in range(m.num_row_groups)]
    names = [
        f"{f.name}:{row}" for f, m in zip(paths, metadata, strict=True) for row in range(m.num_rows)
    ]
    if labels is not None and len(labels) != len(names):
        raise ValueError(f"labels of {path} must be {len(names)}, got {len(labels)}")
    files = [f"{file.relative_to(root).as_posix()} {file.stat().st_size}" for file in paths]
    return Source(
        name=collection_name(path) if split is None else f"{collection_name(path)}/{split}",
        image_names=names,
        class_labels=labels if labels is not None else np.full(len(names), UNLABELLED, np.int64),
        class_names=class_names,
        fingerprint=fingerprint(
            [*files, *class_names, b"" if labels is None else labels.tobytes()]
        ),
        earlier_fingerprint=fingerprint([*files, *class_names]),
        read=ParquetReader(
            paths=tuple(paths),
            column=columns[0],
            first_rows=np.cumsum([0, *rows]),
            groups=tuple((f, g) for f, m in enumerate(metadata) for g in range(m.num_row_groups)),
        ),
    )


def hub_source(name: str, split: str | None) -> Source:
    """Open a data set of the Hugging Face hub (or a folder) through the `datasets` package."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{name} is no file or folder; a name on the hub needs `pip install remixdit[data]`"
        ) from None
    try:
        table = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # datasets raises some twenty kinds, of several packages
        first_line = str(error).strip().split("\n", 1)[0]
        raise ValueError(
            f"{name} is no file or folder, and `datasets` cannot load it: {first_line}"
        ) from error
    return _dataset_source(name, split or "train", table)


@dataclass
class DatasetReader:
    """Reads image i of a `datasets.Dataset`."""

    table: Any
    column: str
    folders: tuple[Path, ...]
    """Where files of a data set may lie: a row that names another would read this machine's."""

    def __call__(self, index: int) -> bytes:
        row = self.table[index][self.column]
        if row["bytes"] is not None:
            return bytes(row["bytes"])
        path = Path(row["path"]).resolve()
        if not any(folder in path.parents for folder in self.folders):
            raise ValueError(f"the row names a file that was not downloaded: {row['path']}")
        return regular_file_bytes(path)


def _dataset_source(name: str, split: str, table: Any) -> Source:
    import datasets

    columns = _columns(Path(name), table.features.arrow_schema)
    class_feature = table.features[columns[1]] if columns[1] else None
    labels = np.full(len(table), UNLABELLED, np.int64)
    class_names: tuple[str, ...] = ()
    if columns[1]:
        given = getattr(class_feature, "names", None)
        labels, class_names = _numbered(np.asarray(table[columns[1]][:]), given)
    table = table.select_columns([columns[0]]).cast_column(columns[0], datasets.Image(decode=False))
    return Source(
        name=f"{name}/{split}",
        image_names=[f"{split}:{row}" for row in range(len(table))],
        class_labels=labels,
        class_names=class_names,
        fingerprint=fingerprint([name, split, len(table), labels.tobytes(), *class_names]),
        read=DatasetReader(table, columns[0], _data_folders(name)),
    )


def _data_folders(name: str) -> tuple[Path, ...]:
    """Return the caches of the hub, and the folder itself if the name is one."""
    import datasets
    import huggingface_hub

    folders = [
        datasets.config.HF_DATASETS_CACHE,
        datasets.config.DOWNLOADED_DATASETS_PATH,
        huggingface_hub.constants.HF_HUB_CACHE,
        *([name] if Path(name).is_dir() else []),
    ]
    return tuple(Path(folder).resolve() for folder in folders)


def _parquet_files(path: Path, split: str | None) -> tuple[Path, list[Path]]:
    """Return the folder the files lie in, and those of the split, in order."""
    root = path if path.is_dir() else path.parent
    paths = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    splits = {_split_name(root, file): file for file in paths}
    if split is not None:
        paths = [file for file in paths if _split_name(root, file) == split]
        if not paths:
            raise ValueError(f"split must be one of {', '.join(sorted(splits))}, got {split!r}")
    elif len(splits) > 1:
        raise ValueError(f"{path} holds splits ({', '.join(sorted(splits))}): choose one by split")
    return root, paths


def _split_name(root: Path, file: Path) -> str:
    """`train-00000-of-00002.parquet`, `train.parquet` and `train/0000.parquet` are all "train"."""
    stem = file.stem.split("-", 1)[0]
    if stem.isdigit():
        return file.parent.name if file.parent != root else ""
    return stem


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return what the hub's metadata say of each column; nothing if there are none."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(metadata)["info"]["features"] if metadata else {}
        stated = {name: feature for name, feature in features.items() if name in schema.names}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the metadata of the hub make no sense: {error!r:.200}") from error
    return {name: feature for name, feature in stated.items() if isinstance(feature, dict)}


def _columns(path: Path, schema: Any) -> tuple[str, str | None]:
    """Return the names of the image column and of the label column, if there is one."""
    features = _features(schema)
    of_type = {
        kind: [name for name, feature in features.items() if feature.get("_type") == kind]
        for kind in ("Image", "ClassLabel")
    }
    image = next(iter([*of_type["Image"], *(c for c in IMAGE_COLUMNS if c in schema.names)]), None)
    if image is None:
        raise ValueError(f"{path} must have an image column, got {', '.join(schema.names)}")
    known = [c for c in LABEL_COLUMNS if c in schema.names]
    return image, next(
        iter([*(c for c in known if c in of_type["ClassLabel"]), *of_type["ClassLabel"], *known]),
        None,
    )


def _check_columns(path: Path, schema: Any, columns: tuple[str, str | None]) -> None:
    for column in columns:
        if column is not None and schema.names.count(column) != 1:
            raise ValueError(f"{path} must have one column {column}, as the first of its files has")


def _labels(
    paths: list[Path], column: str | None, features: dict[str, dict[str, Any]]
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if column is None:
        return None, ()
    import pyarrow as pa
    import pyarrow.parquet as pq

    read = [pq.read_table(file, columns=[column])[column] for file in paths]
    kinds = sorted({str(array.type) for array in read})
    if len(kinds) > 1:
        raise ValueError(f"{column} must be of one type in all files, got {', '.join(kinds)}")
    values = pa.chunked_array([chunk for array in read for chunk in array.chunks], read[0].type)
    return _numbered(values.to_numpy(), features.get(column, {}).get("names"))


def _numbered(values: np.ndarray, given: object) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels as numbers, and the names of the classes."""
    if values.dtype.kind in "iu":
        labels = values.astype(np.int64)
        return labels, _names(given) or numbered_class_names(labels)
    if all(isinstance(value, str) for value in values):
        # Not np.unique: its array takes the length of the longest for each.
        names = sorted(set(values.tolist()))
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([numbers[value] for value in values], np.int64), tuple(names)
    raise ValueError("labels must be integers or strings without gaps")


def _names(given: object) -> tuple[str, ...]:
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"names of the classes must be a list of texts, got {given!r:.200}")
    return tuple(given)
