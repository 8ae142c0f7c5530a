"""Files and directories that are whole or not there.

What is written lies beside its place until it is whole and on the disk; then it is renamed. A
process that is killed leaves at most such a `.partial`, which the next one replaces or removes.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = [
    "LOCK_FILE",
    "PARTIAL_SUFFIX",
    "file_digest",
    "is_left_over",
    "locked",
    "make_directory",
    "new_directory",
    "partial_path",
    "put_in_place",
    "refuse_occupied",
    "remove",
    "remove_left_overs",
    "save_tensors",
    "sync",
    "whole_file",
    "write_file",
]

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"

PARTIAL_SUFFIX = ".partial"


def write_file(path: Path, write: Callable[[Path], object], *, shared: bool = False) -> None:
    """Let `write` make a file beside its place, then rename it.

    Args:
        path: The file; what was there is replaced.
        write: Called with the path to write to.
        shared: Several processes may write the file, each one the same content.
    """
    with whole_file(path, shared=shared) as beside:
        write(beside)


@contextmanager
def whole_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a path to write to that takes its place at the end, or vanishes on an error."""
    beside = partial_path(path, shared=shared)
    try:
        yield beside
        put_in_place(beside, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(beside)):
            error.filename = str(path)  # the name that the user knows
        raise
    finally:
        beside.unlink(missing_ok=True)


def partial_path(path: Path, *, shared: bool = False) -> Path:
    """Return where a file is written; if it is shared, each process has a place of its own."""
    # The same process number may exist on two hosts that write to one file system.
    own = f"{socket.gethostname()}.{os.environ.get('RANK', '0')}.{os.getpid()}"
    name = f"{path.name}.{own}" if shared else f".{path.name}"
    return path.with_name(f"{name}{PARTIAL_SUFFIX}")


def is_left_over(path: Path) -> bool:
    """Whether a file or directory is what a killed process had not finished."""
    return path.name.startswith(".") and path.name.endswith(PARTIAL_SUFFIX)


def remove_left_overs(directory: Path) -> None:
    """Remove what a killed process had not finished; nobody else may be writing there."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if is_left_over(path):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a directory, as far as that is possible.

    A directory is renamed first: half of it must not look whole. On a network, a file that somebody
    reads keeps its directory from being removed; it is a left-over then.
    """
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not is_left_over(path):
        aside = path.with_name(f".{path.name}.old{PARTIAL_SUFFIX}")
        shutil.rmtree(aside, ignore_errors=True)
        path = path.rename(aside)
    shutil.rmtree(path, ignore_errors=True)


def make_directory(directory: Path) -> None:
    """Make a directory and its parents, each on the disk before anything is put into it."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync(path.parent)


def put_in_place(beside: Path, path: Path) -> None:
    """Rename a file that is whole, after it is on the disk: a crash must not leave it empty."""
    sync(beside)
    # Opened before the rename: once the file is there, another process may remove the directory.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        beside.replace(path)
        os.fsync(directory)
    finally:
        os.close(directory)


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Be the only process that writes to a directory.

    The kernel releases the lock when the process ends, however that happens.

    Raises:
        ValueError: Another process holds the lock.
    """
    path = directory / LOCK_FILE
    descriptor = _lock(path)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        with suppress(OSError):  # the directory may have been removed meanwhile
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int:
    """Return the descriptor of a lock file that this process holds."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 300, 0).decode(errors="replace")
            os.close(descriptor)
            raise ValueError(
                f"output_dir must be that of one run at a time, got {path.parent}, to which "
                f"{holder or 'another process'} writes"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                os.close(descriptor)
                raise
            logger.warning("%s: this file system has no locks; start no second run", path.parent)
        # Its last holder may have removed the file between the two calls.
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            return descriptor
        os.close(descriptor)


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Give a directory to write to that takes its place at the end, or vanishes on an error."""
    refuse_occupied(directory)
    directory = directory.resolve()
    exists = directory.exists()
    # An empty directory may be a mount point, which nothing can be renamed to.
    beside = directory / PARTIAL_SUFFIX if exists else partial_path(directory)
    try:
        shutil.rmtree(beside, ignore_errors=True)
        make_directory(beside)
        yield beside
        for path in [*beside.rglob("*"), beside]:
            sync(path)
        if exists:
            for path in beside.iterdir():
                path.rename(directory / path.name)
        else:
            beside.rename(directory)
        sync(directory if exists else directory.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"output must be a directory that can be written, got {directory}: {error.strerror}"
        ) from error
    except OSError as error:
        if error.errno:
            error.filename = str(directory)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def refuse_occupied(directory: Path) -> None:
    """Refuse to write where anything is: it could be a model that took days to train."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"output must be a new or an empty directory, got {directory}")


def save_tensors(tensors: Mapping[str, Any], path: Path, **metadata: str) -> None:
    """Write a safetensors file as any other file is written.

    On its own the library gives a file to its owner alone, whatever the umask allows, and raises
    an error of its own where the disk is full.

    Args:
        tensors: Tensors by name.
        path: The file; what was there is replaced.
        metadata: Texts for the header.

    Raises:
        OSError: It cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata or None)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
    path.chmod(mode)


def file_digest(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
