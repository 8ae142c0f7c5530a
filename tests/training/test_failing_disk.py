"""What cannot be written: pictures and curves are missed, weights and numbers end the run."""

import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from remixdit.cli.main import main
from remixdit.model.loading import newest_checkpoint
from remixdit.training import recorder
from remixdit.training.run import append_metrics, read_metrics
from tests.command_line import files_below, refusal, remixdit

LINE = "--steps 12 --save-every 4 --log-every 1 --sample-every 2 --sample-images 1 --tensorboard"


def replaced(path: Path) -> None:
    """Put something else in the place of a file or directory, which training may write again."""
    was_directory, aside = path.is_dir(), path.parent.parent
    while path.is_dir() == was_directory:
        path.rename(aside / f"{path.name}-{time.monotonic_ns()}")
        with suppress(OSError):
            path.write_text("") if was_directory else path.mkdir()


def moved(run: Path) -> None:
    """Take a run away."""
    run.rename(run.with_name("elsewhere"))


def at_first_line(run: Path, damage: Callable[[Path], None], name: str) -> threading.Thread:
    """Do damage when a run has its first line of metrics, and what is to be damaged is there."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not (run / name).exists() or not read_metrics(run):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        damage(run / name)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("name", "damage"), [("tensorboard", shutil.rmtree), ("samples", replaced)]
)
def test_training_goes_on_without_pictures_and_curves(
    name, damage, data, tmp_path, capsys, monkeypatch
):
    run, damaged = tmp_path / "run", []

    def append(directory: Path, *row: object) -> None:
        append_metrics(directory, *row)
        if (run / name).exists() and not damaged:  # between two steps
            damaged.append(damage(run / name))

    monkeypatch.setattr(recorder, "append_metrics", append)
    remixdit(f"train tiny --data {data} --output-dir {run} {LINE} --sample-inference-steps 1")
    warned, *rest = capsys.readouterr().err.splitlines()  # once
    assert warned.startswith(f"remixdit: {run}/{name}")
    assert warned.endswith("; training goes on")
    assert len(rest) == 4  # the model, and three commands to run next
    assert [row["step"] for row in read_metrics(run)] == list(range(1, 13))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("checkpoints", replaced),
        ("metrics.jsonl", replaced),
        ("config.json", Path.unlink),
        ("", moved),
    ],
    ids=["checkpoints", "metrics", "settings", "run"],
)
def test_training_ends_without_weights_and_numbers(name, damage, data, tmp_path, capsys):
    run = tmp_path / "run"
    line = f"train tiny --data {data} --output-dir {run} --save-every 2 --log-every 1"
    thread = at_first_line(run, damage, name)
    message = refusal(f"{line} --steps 2000 --no-tensorboard", capsys, code=1)
    thread.join()
    assert message.startswith(str(run))


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_checkpoint_that_does_not_fit_leaves_the_earlier_ones(data, tmp_path, capsys):
    run = tmp_path / "run"
    line = f"train tiny --data {data} --output-dir {run} --no-tensorboard"
    remixdit(f"{line} --steps 2")
    before = files_below(run / "checkpoints")
    with full_disk(50_000):  # bytes; the weights are larger
        assert main(f"{line} --steps 2000 --save-every 1".split()) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    place = f"{run}/checkpoints/step-00000003"
    assert message == f"remixdit: error: {place}: File too large"
    assert files_below(run / "checkpoints") == before


def test_left_overs_of_killed_processes_are_removed(data, tmp_path):
    run = tmp_path / "run"
    line = f"train tiny --data {data} --output-dir {run} --no-tensorboard"
    run.mkdir()
    (run / ".config.json.partial").write_text("")  # killed as it began
    remixdit(f"{line} --steps 1")
    clean = files_below(run)
    assert not [name for name in clean if "partial" in name]
    for name in ("checkpoints/.step-00000007.partial", "checkpoints/.step-00000001.old.partial"):
        shutil.copytree(run / "checkpoints" / "step-00000001", run / name)
    for name in (".metrics.jsonl.partial", "model/.model.safetensors.partial"):
        (run / name).write_text("")
    assert main(f"{line} --steps 1".split()) == 0
    assert files_below(run) == clean


def test_a_checkpoint_that_somebody_reads_can_be_pruned(data, tmp_path, monkeypatch):
    """On a network, a file that is open keeps its directory from being removed."""
    removed = os.rmdir

    def busy(path: str, **options: object) -> None:
        if "partial" in str(path):
            raise OSError(39, "Directory not empty", path)
        removed(path, **options)

    monkeypatch.setattr(os, "rmdir", busy)
    run = tmp_path / "run"
    line = f"train tiny --data {data} --output-dir {run} --no-tensorboard"
    remixdit(f"{line} --steps 4 --save-every 1 --keep-checkpoints 1")
    newest = newest_checkpoint(run)
    assert newest
    assert newest.name == "step-00000004"
    assert len(list((run / "checkpoints").glob("step-*"))) == 1
