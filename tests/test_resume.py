"""Runs that stop and go on: nothing is lost, nothing is different."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from remixdit.run import read_metrics
from tests.command_line import refusal, remixdit, write_npz


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


def assert_equal_runs(run: Path, other: Path, step: int = 20) -> None:
    """Compare all weights, averages and moments bit for bit, and the losses."""
    names = [f"checkpoints/step-{step:08}/{part}" for part in ("model", "ema", "optimizer")]
    for name in (*names, "model/model"):
        ours, theirs = (load_file(path / f"{name}.safetensors") for path in (run, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    ours, theirs = ([(r["step"], r["loss"]) for r in read_metrics(path)] for path in (run, other))
    assert ours == theirs


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
        "--coefficients one_hot --num-bases 4 --experts-per-step 1",
        "--coefficients raw --per-block --micro-batch-size 5",
        "--prediction-type flow_prediction --logit-normal --mirror --warmup-steps 5",
        "--precision bf16 --mixed all",
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
    )


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Wait until a checkpoint of a step, or of a later one, is there."""
    while max(checkpoint_steps(run), default=0) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
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
                errors == f"remixdit: interrupted; the same command goes on from step {reached}\n"
            )
        else:
            assert process.returncode == -signal.SIGKILL
    steps = max(checkpoint_steps(run)) + 5
    options = f"--steps {steps} --log-every 1 --keep-checkpoints 2"
    for path in (run, whole):
        remixdit(f"train tiny --data {data} --output-dir {path} {options}")
    assert_equal_runs(run, whole, steps)
    assert not list((run / "checkpoints").glob(".*"))


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


def test_finished_run_says_so(data, unbroken, capsys):
    before = (unbroken / "metrics.jsonl").read_bytes()
    remixdit(f"train tiny --data {data} --output-dir {unbroken} --log-every 7")
    assert "has its 20 steps already" in capsys.readouterr().err
    assert (unbroken / "metrics.jsonl").read_bytes() == before
    stated = json.loads((unbroken / "config.json").read_text())
    assert stated["output"]["log_every"] == 7


def test_diverged_training_ends_in_one_line(data, tmp_path, capsys):
    line = f"train tiny --data {data} --output-dir {tmp_path}/run --learning-rate 1e30"
    message = refusal(f"{line} --log-every 1", capsys, code=1)
    assert message.startswith("training diverged: the loss is ")


def test_full_disk_ends_in_one_line_and_the_run_goes_on(data, unbroken, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    line = f"train tiny --data {data} --output-dir {tmp_path}/run --log-every 1"
    remixdit(f"{line} --steps 5")
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # bytes; the weights are larger
    try:
        message = refusal(line, capsys, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "too large" in message
    assert checkpoint_steps(tmp_path / "run") == [5]
    remixdit(line)
    assert_equal_runs(tmp_path / "run", unbroken)
