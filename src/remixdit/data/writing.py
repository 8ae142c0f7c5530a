"""A directory of shards in the making: after a crash it holds whole files only."""

import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from remixdit.data.index import INDEX_FILE, shard_file
from remixdit.data.shards import LABELS_FILE
from remixdit.files import PARTIAL_SUFFIX, file_digest, partial_path, put_in_place, sync, write_file
from remixdit.images.squares import PictureBatch

__all__ = ["PARTS_DIR", "EncodedDir", "ShardRecord", "ShardWriter"]

PARTS_DIR = ".encoding"
SETTINGS_FILE = "settings.json"


@dataclass
class ShardRecord:
    """Facts about one shard for the index."""

    num_images: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    """File name => SHA-256 of the file."""
    class_labels: list[int] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def add(self, batch: PictureBatch) -> None:
        """Count a batch that has been written."""
        self.num_images += len(batch.pixels)
        self.class_labels += batch.class_labels.tolist()
        self.skipped += [asdict(skipped) for skipped in batch.skipped]


class EncodedDir:
    """A directory of shards in the making."""

    def __init__(
        self, directory: Path, settings: Mapping[str, Any], earlier_fingerprint: str = ""
    ) -> None:
        self.directory, self.settings = directory, settings
        self.earlier_fingerprint = earlier_fingerprint
        self.parts = directory / PARTS_DIR

    def start(self) -> bool:
        """Write the settings into the directory; return whether there is work left."""
        # In this order: another process may write the index and then remove the settings.
        places = self.parts / SETTINGS_FILE, self.directory / INDEX_FILE
        stated = _first_json(*places)
        if stated is None and self._is_occupied():
            stated = _first_json(*places)  # another process may have begun since, and finished
            if stated is None:
                raise ValueError(f"output {self.directory} exists and is no encoding")
        if stated is not None:
            self._check_same(stated)
        if self._tidy_if_merged():
            return False
        self.parts.mkdir(parents=True, exist_ok=True)
        if stated is None:
            self._claim()
        else:
            _write(self.parts / SETTINGS_FILE, _json(self.settings))
        return not self._tidy_if_merged()

    def _is_occupied(self) -> bool:
        """Whether the directory holds anything but what another process makes first."""
        if not self.directory.exists():
            return False
        if not self.directory.is_dir():
            raise ValueError(f"output must be a directory, got the file {self.directory}")
        return any(path.name != PARTS_DIR for path in self.directory.iterdir())

    def _claim(self) -> None:
        """State the settings where there were none, unless another process is faster."""
        path = self.parts / SETTINGS_FILE
        is_first = _write_first(path, _json(self.settings))
        # One that was much faster has finished, and the index has its settings.
        places = [self.directory / INDEX_FILE] if is_first else [path, self.directory / INDEX_FILE]
        try:
            self._check_same(_first_json(*places) or self.settings)
        except ValueError:
            if is_first:
                path.unlink()
            raise

    def record(self, number: int) -> ShardRecord | None:
        """Return the record of a shard, if it is there."""
        content = _first_json(self._record_path(number))
        return None if content is None else ShardRecord(**content)

    @contextmanager
    def writer(self, number: int) -> Iterator["ShardWriter"]:
        """Open a shard; its files are put in place by `finish`, and removed otherwise."""
        paths = [self.directory / shard_file(number)]
        if self.settings["mirrored"]:
            paths.append(self.directory / shard_file(number, mirrored=True))
        writer = ShardWriter(paths, self.settings["shape"], self.settings["dtype"])
        try:
            yield writer
        finally:
            writer.close()

    def finish(self, number: int, writer: "ShardWriter", record: ShardRecord) -> None:
        """Put a shard in its place, then its record: a record means that the shard is there."""
        record.digests = writer.finish()
        _write(self._record_path(number), _json(asdict(record)))

    def merge(self, num_shards: int) -> None:
        """Write the index if all shards are there, and remove the records it replaces."""
        records = [self.record(number) for number in range(num_shards)]
        present = [record for record in records if record is not None]
        if len(present) == num_shards:
            index, class_labels = _merged(self.settings, present)
            try:
                _write(self.directory / LABELS_FILE, _npy(class_labels))
                _write(self.directory / INDEX_FILE, _json(index))
            except (
                FileNotFoundError
            ):  # another process has written the index and removed our partial file
                if not (self.directory / INDEX_FILE).exists():
                    raise
        self._tidy_if_merged()

    def _tidy_if_merged(self) -> bool:
        """Remove records and partial files if the index is there; return whether it is."""
        if not (self.directory / INDEX_FILE).exists():
            return False
        shutil.rmtree(self.parts, ignore_errors=True)  # another process may be removing it too
        for partial in self.directory.glob(f"*{PARTIAL_SUFFIX}"):  # of a killed process
            partial.unlink(missing_ok=True)
        return True

    def discard_if_empty(self) -> None:
        """Remove the directory if no image has been written to it."""
        records = [_first_json(path) for path in self.parts.glob("*-*.json")]
        if not self.parts.is_dir() or any(record and record["num_images"] for record in records):
            return
        for path in (*self.directory.glob("*.npy"), *self.directory.glob(f"*{PARTIAL_SUFFIX}")):
            path.unlink()
        shutil.rmtree(self.parts)
        self.directory.rmdir()

    def _check_same(self, stated: Mapping[str, Any]) -> None:
        earlier = {**self.settings["source"], "fingerprint": self.earlier_fingerprint}
        if self.earlier_fingerprint and stated.get("source") == earlier:
            stated = {**stated, "source": self.settings["source"]}
        for name, value in self.settings.items():
            if stated.get(name) != value:
                raise ValueError(
                    f"output {self.directory} holds another encoding: its {name} is "
                    f"{_short(stated.get(name))}, not {_short(value)}"
                )

    def _record_path(self, number: int) -> Path:
        return self.parts / Path(shard_file(number)).with_suffix(".json").name


class ShardWriter:
    """Appends rows to .npy files, which get their names only when they are complete."""

    def __init__(self, paths: list[Path], row_shape: list[int], dtype: str) -> None:
        self.paths, self.row_shape, self.dtype = paths, row_shape, np.dtype(dtype)
        self.num_rows = [0 for _ in paths]
        self._stack = ExitStack()
        self._files = []
        for path in paths:
            beside = partial_path(path, shared=True)
            self._stack.callback(beside.unlink, missing_ok=True)
            self._files.append(self._stack.enter_context(beside.open("wb")))
            self._write_header(len(self._files) - 1)

    def append(self, rows: np.ndarray) -> None:
        """Add rows (B, *row_shape)."""
        self._append(0, rows)

    def append_mirrored(self, rows: np.ndarray) -> None:
        """Add the rows of the mirrored images."""
        self._append(1, rows)

    def finish(self) -> dict[str, str]:
        """Put the files in their places; return their names and sha256."""
        digests = {}
        for number, (path, file) in enumerate(zip(self.paths, self._files, strict=True)):
            file.seek(0)
            self._write_header(number)  # numpy leaves room in it for any number of rows
            file.flush()
            beside = partial_path(path, shared=True)
            digests[path.name] = file_digest(beside)
            put_in_place(beside, path)
        return digests

    def close(self) -> None:
        """Remove unfinished files."""
        self._stack.close()

    def _append(self, number: int, rows: np.ndarray) -> None:
        self._files[number].write(np.ascontiguousarray(rows, self.dtype).tobytes())
        self.num_rows[number] += len(rows)

    def _write_header(self, number: int) -> None:
        np.lib.format.write_array_header_1_0(
            self._files[number],
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (self.num_rows[number], *self.row_shape),
            },
        )


def _merged(
    settings: Mapping[str, Any], records: list[ShardRecord]
) -> tuple[dict[str, Any], np.ndarray]:
    """Return the index, and the labels (n,) int64 with the null label where there is none."""
    skipped = [skipped for record in records for skipped in record.skipped]
    if sum(record.num_images for record in records) == 0:
        raise ValueError(
            f"no image of {settings['source']['name']} can be read, such as "
            f"{skipped[0]['image']}: {skipped[0]['reason']}"
        )
    num_classes = len(settings["class_names"])
    labels = np.array([label for record in records for label in record.class_labels], np.int64)
    labels[labels < 0] = num_classes
    index = {
        **settings,
        "num_images": len(labels),
        "num_classes": num_classes,
        "class_counts": np.bincount(labels, minlength=num_classes + 1)[:num_classes].tolist(),
        "class_labels_digest": hashlib.sha256(_npy(labels)).hexdigest(),
        "shards": [{"num_images": r.num_images, "digests": r.digests} for r in records],
        "skipped": skipped,
    }
    return index, labels


def _write(path: Path, content: bytes) -> None:
    write_file(path, lambda beside: beside.write_bytes(content), shared=True)


def _write_first(path: Path, content: bytes) -> bool:
    """Write a file that does not exist yet; return False if another process has written it."""
    beside = partial_path(path, shared=True)
    try:
        beside.write_bytes(content)
        sync(beside)
        os.link(beside, path)  # unlike a rename it does not replace
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        beside.replace(path)  # this file system has no hard links
    finally:
        beside.unlink(missing_ok=True)
    return True


def _first_json(*paths: Path) -> dict[str, Any] | None:
    """Return the content of the first file that exists."""
    for path in paths:
        try:
            content: dict[str, Any] = json.loads(path.read_bytes())
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        return content
    return None


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."
