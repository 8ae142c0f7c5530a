"""A real file system is cut off while a run writes to it: ext4 on a loop device, copied as it is.

What the kernel has not written back by then is not on the copy, as after a power failure. The copy
is mounted, which replays its journal, and the run resumes there.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from remixdit.model.loading import newest_checkpoint, steps_done
from remixdit.training.run import read_metrics
from tests.command_line import remixdit
from tests.processes import environment

pytestmark = pytest.mark.long

CUTS, EARLY = 60, 20  # early ones come fast: data are encoded, the first checkpoint is written
OPTIONS = "--save-every 1 --log-every 1 --no-tensorboard --sample-every 0"


def shell(*words: object) -> bool:
    """Run a command; return whether it went well."""
    return subprocess.run([*map(str, words)], capture_output=True, check=False).returncode == 0


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[Path]:
    """Mount a disk; the test is skipped where that is not allowed."""
    place.mkdir(exist_ok=True)
    if not shell("mount", "-o", "loop", image, place):
        pytest.skip("needs root and a loop device")
    try:
        yield place
    finally:
        assert shell("umount", place)


def reached(run: Path) -> int:
    """Return the steps of the newest checkpoint."""
    newest = newest_checkpoint(run)
    return steps_done(newest) if newest else 0


def cuts_of(data: Path, directory: Path) -> list[tuple[Path, int]]:
    """Train on a disk; return copies of it from random moments, each with the steps saved by then.

    Args:
        data: Pictures, on another disk.
        directory: Directory for the copies.
    """
    image, rng, found = directory / "disk", random.Random(0), []
    with image.open("wb") as file:
        file.truncate(96 * 2**20)
    assert shell("mkfs.ext4", "-q", "-F", image)
    with mounted(image, directory / "live") as place:
        line = f"train tiny --data {data} --output-dir {place}/run --steps 100000 {OPTIONS}"
        words = [sys.executable, "-m", "remixdit", *line.split(), "--keep-checkpoints", "2"]
        with subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL) as training:
            try:
                while not (place / "run").exists():
                    time.sleep(0.01)
                for number in range(CUTS):
                    time.sleep(rng.uniform(0, 0.02 if number < EARLY else 0.5))
                    training.send_signal(signal.SIGSTOP)
                    saved, copy = reached(place / "run"), directory / f"cut-{number}"
                    assert shell("cp", "--sparse=always", image, copy)
                    training.send_signal(signal.SIGCONT)
                    found.append((copy, saved))
            finally:
                training.kill()
    return found


def assert_resumes(data: Path, run: Path, whole: Path, saved: int) -> int:
    """Resume two steps further than the copy of a disk holds; return how many it holds."""
    step = reached(run)
    assert step >= saved - 1  # the newest may have been renamed, but not synced
    remixdit(f"train tiny --data {data} --output-dir {run} --steps {step + 2} {OPTIONS}")
    remixdit(
        f"train tiny --data {data} --output-dir {whole} --steps {max(step + 2, reached(whole))} "
        f"{OPTIONS} --keep-checkpoints 100000"
    )
    for part in ("model", "ema", "optimizer"):
        name = f"checkpoints/step-{step + 2:08}/{part}.safetensors"
        ours, theirs = load_file(run / name), load_file(whole / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, step + 3))
    losses = [row["loss"] for row in read_metrics(whole)]
    assert [row["loss"] for row in rows] == losses[: step + 2]
    return step


def test_a_disk_that_is_cut_off_loses_nothing_that_was_saved(data, tmp_path):
    if os.geteuid() or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4")
    steps = []
    for copy, saved in cuts_of(data, tmp_path):
        with mounted(copy, tmp_path / "copy") as place:
            steps.append(assert_resumes(data, place / "run", tmp_path / "whole", saved))
        copy.unlink()
    print(f"{len(steps)} cuts, {sum(step > 0 for step in steps)} with a checkpoint: {steps}")
    assert steps[-1] > 0
