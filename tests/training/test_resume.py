"""Runs that stop and go on: nothing is lost, nothing is different."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from remixdit.cli.main import main
from remixdit.training.run import read_metrics
from tests.command_line import files_below, refusal, remixdit, write_folder, write_npz
from tests.processes import assert_equal_runs


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pictures."""
    return write_npz(tmp_path_factory.mktemp("data") / "pictures.npz")


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory) -> Path:
    """A run of 20 steps that nothing stopped."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    remixdit(f"train tiny --data {data} --output-dir {run} --log-every 1")
    return run


def checkpoint_steps(run: Path) -> list[int]:
    """Return the steps of the checkpoints that a run keeps."""
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def test_extended_run_equals_unbroken_run(data, unbroken, tmp_path):
    line = f"train tiny --data {data} --output-dir {tmp_path}/run --log-every 1"
    for steps in (3, 4, 11, 20):
        remixdit(f"{line} --steps {steps}")
    assert_equal_runs(tmp_path / "run", unbroken)


@pytest.mark.parametrize(
    "options",
    [
        "--num-bases 1 --num-experts 1 --timestep-strata 4",
        "--experts-per-step 1 --prior-strength 1e-3 --prior-schedule constant",
        "--coefficients one_hot --num-bases 4",
        "--coefficients raw --per-block --micro-batch-size 5",
        "--prediction-type flow_prediction --logit-normal --mirror --warmup-steps 5",
        "--precision bf16 --mixed all",
        "--algorithm muon --weight-decay 0.1",
    ],
)
def test_every_kind_of_run_resumes_exactly(options, data, tmp_path):
    for run, parts in (("whole", (8,)), ("parts", (3, 8))):
        for steps in parts:
            remixdit(
                f"train tiny --data {data} --output-dir {tmp_path}/{run} --log-every 1 "
                f"--steps {steps} {options}"
            )
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts", step=8)


def start(data: Path, run: Path, steps: int) -> subprocess.Popen[str]:
    """Start a run that saves every step, in a process of its own."""
    options = f"--steps {steps} --save-every 1 --log-every 1 --keep-checkpoints 2"
    command = f"-m remixdit train tiny --data {data} --output-dir {run} {options}"
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # else the last bits may differ
    return subprocess.Popen(
        [sys.executable, *command.split()],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads},
        # Tests that a script starts with & inherit that it is ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Wait until a checkpoint of a step, or of a later one, is there."""
    while max(checkpoint_steps(run), default=0) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.long
def test_killed_run_equals_unbroken_run(data, tmp_path):
    run, whole, steps = tmp_path / "run", tmp_path / "whole", 400
    for stop, step in ((signal.SIGINT, 3), (signal.SIGKILL, 12), (signal.SIGKILL, 30)):
        process = start(data, run, steps)
        wait_for_step(process, run, step)
        process.send_signal(stop)
        _, errors = process.communicate(timeout=60)
        if stop == signal.SIGINT:
            reached = max(checkpoint_steps(run))
            assert process.returncode == 130
            assert (
                f"remixdit: stopped by SIGINT; saved {run}/checkpoints/step-{reached:08}" in errors
            )
        else:
            assert process.returncode == -signal.SIGKILL
    steps = max(checkpoint_steps(run)) + 5
    options = f"--steps {steps} --log-every 1 --keep-checkpoints 2"
    for path in (run, whole):
        remixdit(f"train tiny --data {data} --output-dir {path} {options}")
    assert_equal_runs(run, whole, steps)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize("source", ["--num-bases 1 --num-experts 1", ""], ids=["plain", "mixture"])
def test_a_run_goes_on_without_the_model_it_started_from(source, data, tmp_path, capsys):
    line = f"train tiny --data {data} --log-every 1 --output-dir {tmp_path}"
    # Another width than the preset's: what a run trains is known to the run alone.
    remixdit(f"{line}/source --steps 2 --hidden-size 16 {source}")
    start = f"--from {tmp_path}/source"
    remixdit(f"{line}/whole {start} --steps 6")
    remixdit(f"{line}/parts {start} --steps 3")
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    message = refusal(f"{line}/parts --from {tmp_path}/elsewhere --steps 6", capsys)
    assert message.endswith(f"parts: --from was '{tmp_path}/source', now '{tmp_path}/elsewhere'")
    message = refusal(f"{line}/parts --steps 6", capsys)
    assert f"--from was '{tmp_path}/source', now None" in message
    message = refusal(f"{line}/parts {start} --steps 6 --num-experts 5", capsys)
    assert message.endswith("parts: mixture.num_experts was 4, now 5")
    remixdit(f"{line}/parts {start} --steps 6")
    assert_equal_runs(tmp_path / "parts", tmp_path / "whole", step=6)


def test_another_spelling_of_a_path_is_no_change(tmp_path, monkeypatch):
    write_folder(tmp_path / "photos", cat=9, dog=9)
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    remixdit("train tiny --data photos --output-dir plain --num-bases 1 --num-experts 1 --steps 1")
    line = f"train tiny --log-every 1 --output-dir {tmp_path}/run"
    remixdit(f"{line} --data photos --from plain --steps 1")
    spellings = [
        ("./photos", "./plain"),
        ("photos/", "plain/"),
        (f"{tmp_path}/photos", f"{tmp_path}/plain"),
        ("plain/../link", "photos/../plain"),
    ]
    for steps, (data, source) in enumerate(spellings, start=2):
        remixdit(f"{line} --data {data} --from {source} --steps {steps}")
        assert checkpoint_steps(tmp_path / "run")[-1] == steps
    monkeypatch.chdir(tmp_path / "photos")
    remixdit(f"{line} --data . --from ../plain --steps 6")
    assert checkpoint_steps(tmp_path / "run")[-1] == 6


def test_data_are_told_by_their_content(data, tmp_path, capsys):
    other = write_npz(tmp_path / "other.npz", count=32)
    for name, source in (("shards", data), ("others", other)):
        remixdit(f"encode {source} --output {tmp_path}/{name} --image-size 16")
    line = f"train tiny --output-dir {tmp_path}/run --log-every 1"
    remixdit(f"{line} --data {tmp_path}/shards --steps 1")
    (tmp_path / "shards").rename(tmp_path / "moved")
    before = files_below(tmp_path / "run")
    for changed in ("others", "other.npz"):  # the second must not be encoded into the run first
        message = refusal(f"{line} --data {tmp_path}/{changed} --steps 2", capsys)
        assert f"data was '{tmp_path}/shards', now '{tmp_path}/{changed}'" in message
        assert files_below(tmp_path / "run") == before
    remixdit(f"{line} --data {tmp_path}/moved --steps 2")
    assert checkpoint_steps(tmp_path / "run")[-1] == 2


def test_what_a_run_encoded_is_encoded_again_when_it_was_removed(data, unbroken, tmp_path):
    line = f"train tiny --data {data} --output-dir {tmp_path}/run --log-every 1"
    remixdit(f"{line} --steps 3")
    shutil.rmtree(tmp_path / "run" / "data")
    remixdit(line)
    assert_equal_runs(tmp_path / "run", unbroken)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("--lr-schedule cosine", "lr_schedule cosine"),
        ("--prior-strength 1e-3", "prior_schedule linear"),
        (
            "--prior-strength 1e-3 --lr-schedule cosine",
            "lr_schedule cosine and prior_schedule linear",
        ),
        ("--prior-strength 1e-3 --prior-schedule constant", ""),
    ],
)
def test_a_schedule_that_more_steps_stretch_is_warned_of(options, names, data, tmp_path, capsys):
    line = f"train tiny --data {data} --output-dir {tmp_path}/run {options}"
    remixdit(f"{line} --steps 2")
    remixdit(f"{line} --steps 2")  # as it was: nothing to warn of
    assert "the end of" not in capsys.readouterr().err
    remixdit(f"{line} --steps 3")
    first = capsys.readouterr().err.splitlines()[0]
    expected = (
        f"remixdit: the end of {names} moves from step 2 to 3: up to step 2 this run is one of 2 "
        "steps, from there on one of 3, so its result is that of neither"
    )
    assert first == (expected if names else f"remixdit: {tmp_path}/run goes on from step 2 of 3")


def test_newest_checkpoints_are_kept(data, tmp_path):
    run = tmp_path / "run"
    line = f"train tiny --data {data} --output-dir {run} --save-every 2 --keep-checkpoints 2"
    remixdit(f"{line} --steps 7")
    assert checkpoint_steps(run) == [6, 7]


def test_metrics_are_cut_back_to_the_checkpoint(data, tmp_path):
    run = tmp_path / "run"
    line = f"train tiny --data {data} --output-dir {run} --log-every 1"
    remixdit(f"{line} --steps 4")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 99}\n{"step": 6, "lo')
    remixdit(f"{line} --steps 5")
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5]
    assert read_metrics(run)[-1]["loss"] < 99


def test_damaged_lines_of_metrics_are_left_out_with_a_warning(data, tmp_path, capsys):
    run = tmp_path / "run"
    line = f"train tiny --data {data} --output-dir {run} --log-every 1"
    remixdit(f"{line} --steps 4")
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "\0" * 20 + "\n", "[" * 100_000 + "\n", lines[3]]))
    capsys.readouterr()
    remixdit(f"{line} --steps 5")
    assert f"{path}: 2 of 4 lines are damaged and left out, such as line 2" in (
        capsys.readouterr().err
    )
    assert [row["step"] for row in read_metrics(run)] == [1, 4, 5]


def test_finished_run_says_so(data, unbroken, capsys):
    before = (unbroken / "metrics.jsonl").read_bytes()
    remixdit(f"train tiny --data {data} --output-dir {unbroken} --log-every 7")
    assert "has its 20 steps already" in capsys.readouterr().err
    assert (unbroken / "metrics.jsonl").read_bytes() == before
    stated = json.loads((unbroken / "config.json").read_text())
    assert stated["output"]["log_every"] == 7


def test_full_disk_ends_in_one_line_and_the_run_goes_on(data, unbroken, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    line = f"train tiny --data {data} --output-dir {tmp_path}/run --log-every 1"
    remixdit(f"{line} --steps 5")
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # bytes; the weights are larger
    try:
        assert main(line.split()) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("remixdit: error: ")
    assert "too large" in message
    assert checkpoint_steps(tmp_path / "run") == [5]
    remixdit(line)
    assert_equal_runs(tmp_path / "run", unbroken)


def test_a_run_that_encoded_its_data_goes_on_without_their_source(tmp_path, capsys):
    source = write_npz(tmp_path / "pictures.npz")
    line = f"train tiny --output-dir {tmp_path}/run --num-bases 1 --num-experts 1"
    remixdit(f"{line} --data {source} --steps 2")
    source.unlink()
    remixdit(f"{line} --data {source} --steps 3")
    assert checkpoint_steps(tmp_path / "run")[-1] == 3
    assert "other.npz" in refusal(f"{line} --data {tmp_path}/other.npz --steps 4", capsys)
