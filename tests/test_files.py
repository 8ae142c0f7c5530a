"""Files that are whole or not there."""

import hashlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from remixdit.files import (
    file_digest,
    locked,
    new_directory,
    partial_path,
    remove,
    remove_left_overs,
    whole_file,
    write_file,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with whole_file(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("shared", [False, True])
def test_what_fails_leaves_the_old_file_and_nothing_beside(shared, tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write(beside: Path) -> None:
        beside.write_text("half of")
        raise ArithmeticError("it went wrong")

    with pytest.raises(ArithmeticError, match="it went wrong"):
        write_file(path, write, shared=shared)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_what_a_killed_process_left_is_replaced(tmp_path):
    partial_path(tmp_path / "a").write_text("half of")
    write_file(tmp_path / "a", lambda beside: beside.write_text("whole"))
    assert names(tmp_path) == ["a"]


def test_processes_that_share_a_file_write_beside_it_apart(tmp_path, monkeypatch):
    path = tmp_path / "index.json"
    monkeypatch.delenv("RANK", raising=False)
    ours = partial_path(path, shared=True)
    monkeypatch.setattr("os.getpid", lambda: 1)
    assert partial_path(path, shared=True) != ours
    assert partial_path(path, shared=True).name == f"index.json.{socket.gethostname()}.0.1.partial"
    assert partial_path(path).name == ".index.json.partial"


@pytest.mark.parametrize("exists", [False, True])
def test_a_directory_is_new_or_stays_as_it_was(exists, tmp_path):
    directory = tmp_path / "model"
    if exists:
        directory.mkdir()
    with pytest.raises(ArithmeticError), new_directory(directory) as beside:  # noqa: PT012
        (beside / "weights").write_text("half of")
        raise ArithmeticError
    assert directory.exists() == exists
    with new_directory(directory) as beside:
        (beside / "weights").write_text("whole")
    assert names(directory) == ["weights"]
    assert names(tmp_path) == ["model"]
    with (
        pytest.raises(ValueError, match="output must be a new or an empty directory"),
        new_directory(directory),
    ):
        pass


def test_a_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"bytes")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"bytes").hexdigest()


def hold_lock(directory: Path) -> int:
    """Let a process of its own hold the lock of a directory; return its number."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with locked(directory):
            os.write(writer, b"1")
            time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    return child


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    child = hold_lock(tmp_path)
    try:
        holder = f"process {child} on {socket.gethostname()} writes$"
        with pytest.raises(ValueError, match=holder), locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path), pytest.raises(ValueError, match="one run at a time"), locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_had_not_finished_is_removed(tmp_path):
    for name in (".a.partial", "b.partial", ".c"):
        (tmp_path / name).write_text("")
    (tmp_path / ".step.partial").mkdir()
    (tmp_path / ".step.partial" / "file").write_text("")
    remove_left_overs(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c", "b.partial"]


def test_a_directory_that_is_removed_never_looks_whole(tmp_path, monkeypatch):
    """A file that somebody reads on a network keeps its directory from being removed."""
    (tmp_path / "step").mkdir()
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)
    remove(tmp_path / "step")
    assert [path.name for path in tmp_path.iterdir()] == [".step.old.partial"]
    monkeypatch.undo()
    remove_left_overs(tmp_path)
    assert list(tmp_path.iterdir()) == []
