"""Files of `torch.save` that nobody would save: refused in one sentence, before memory is taken."""

import argparse
import os
from pathlib import Path

import pytest
import torch

from remixdit.interchange.files import read_tensors


class Runs:
    """A pickle that would run a command."""

    def __reduce__(self):
        return os.system, ("touch hostile",)


def nested(depth: int) -> object:
    """Return lists in lists around what would run."""
    content: object = Runs()
    for _ in range(depth):
        content = [content]
    return content


WEIGHTS = {"w": torch.ones(3)}


@pytest.mark.parametrize(
    "content",
    [
        Runs(),
        nested(5),
        {"model": {**WEIGHTS, "x": Runs()}},
        {"model": WEIGHTS, "opt": {"state": {0: {"y": [nested(3)]}}}},
        {"model": WEIGHTS, "args": argparse.Namespace(path=Runs())},
        {"model": WEIGHTS, "args": argparse.Namespace(path=Path("x"))},
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_what_would_run_code_is_refused_at_every_depth(content, is_zip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "file.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match="nothing that runs code"):
        read_tensors(Path("file.pt"))
    assert not Path("hostile").exists()


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (torch.ones(1).expand(2**45), "must hold its 140,737,488,355,328 bytes in the file, got 4"),
        (torch.ones(2, 2).to_sparse(), "must be a dense tensor, got torch.sparse_coo"),
        (torch.ones(2**40, device="meta"), "must be a dense tensor, got meta"),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_tensor_that_is_no_plain_array_is_refused(tensor, sentence, is_zip, tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"w": tensor}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"^'w' of .*file\.pt") as caught:
        read_tensors(path)
    assert sentence in str(caught.value)


def test_an_infinitely_deep_file_is_refused(tmp_path):
    """A pickle of marks and lists, which takes no memory to write."""
    path = tmp_path / "file.pt"
    path.write_bytes(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".")
    with pytest.raises(ValueError, match="it cannot be read"):
        read_tensors(path)
