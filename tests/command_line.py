"""What the tests of the command line share: small pictures on disk, and short commands."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from remixdit.cli.main import main
from remixdit.model.model import RemixDiT
from tests.tiny import perturb, tiny_dit

SIDE = 16


def pixels(count: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Noise, (count, SIDE, SIDE, channels) uint8."""
    shape = (count, SIDE, SIDE, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_npz(path: Path, count: int = 24, channels: int = 3, num_classes: int = 3) -> Path:
    """Write pictures with labels."""
    np.savez(path, arr_0=pixels(count, channels), arr_1=np.arange(count) % num_classes)
    return path


def write_folder(root: Path, **counts: int) -> Path:
    """Write a folder of class folders with so many pictures each."""
    for seed, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index, picture in enumerate(pixels(count, seed=seed)):
            Image.fromarray(picture).save(root / name / f"{index}.png")
    return root


def remixdit(line: str) -> None:
    """Run a command that must succeed."""
    assert main(line.split()) == 0


def refusal(line: str, capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run a command that must be refused; return its one sentence.

    Before that the command may have said which weights it takes.
    """
    capsys.readouterr()
    assert main(line.split()) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    *before, error = printed.err.splitlines()
    assert all(" weights of " in said for said in before), printed.err
    assert error.startswith("remixdit: error: ")
    return error.removeprefix("remixdit: error: ")


def json_result(line: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run a command with --json; return what it printed, which must be strict JSON."""
    capsys.readouterr()
    remixdit(f"{line} --json")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(capsys.readouterr().out, parse_constant=refuse)


def save_model(directory: Path, seed: int, num_experts: int = 5, **options: object) -> Path:
    """Write a model of pixels that is trained on nothing, with experts that differ."""
    network = tiny_dit(seed, input_size=SIDE, patch_size=4, in_channels=3)
    model = RemixDiT.from_dit(network, min(2, num_experts), num_experts, **options)
    if num_experts > 1:
        perturb(model.experts, 0.3, seed)
    model.save_pretrained(directory)
    return directory


def files_below(directory: Path) -> set[str]:
    """Return every file and directory, by its relative path."""
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}
