"""Files that are whole or not there."""

import hashlib
from pathlib import Path

import pytest

from remixdit.files import file_digest, new_directory, partial_path, whole_file, write_file


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
    ours = partial_path(path, shared=True)
    monkeypatch.setattr("os.getpid", lambda: 1)
    assert partial_path(path, shared=True) != ours
    assert partial_path(path, shared=True).name == "index.json.1.partial"
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
