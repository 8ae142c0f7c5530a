"""Processes that fail, die or hang end all, are named, and the same command goes on."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from remixdit.cli.main import main
from remixdit.model.loading import newest_checkpoint, steps_done
from remixdit.training.run import read_metrics
from tests.command_line import files_below, refusal, save_model
from tests.processes import (
    OPTIONS,
    assert_equal_runs,
    free_port,
    launch,
    start_host,
    start_processes,
    wait_for_checkpoint,
    worker_pids,
)


@pytest.fixture
def train(data) -> str:
    """The start of the command that trains."""
    return f"train tiny --data {data} {OPTIONS}"


BROKEN_DISK = """
import errno, os, sys
from remixdit.cli.main import main
from remixdit.training.trainer import Training

def broken(self, inputs):
    raise OSError(errno.EIO, os.strerror(errno.EIO), "latents-00000.npy")

if os.environ["RANK"] == "1":
    Training.take_step = broken
sys.exit(main(sys.argv[1:]))
"""


def test_the_error_of_another_process_than_the_first_is_heard(train, tmp_path):
    (tmp_path / "script.py").write_text(BROKEN_DISK)
    line = f"{train} --output-dir {tmp_path}/run"
    errors = launch(line, code=1, program=f"{tmp_path}/script.py")
    assert "remixdit, process 1: error: latents-00000.npy: Input/output error" in errors


def start_long_run(line: str, run: Path) -> "subprocess.Popen[str]":
    """Start a run on two processes, and wait until it has a checkpoint."""
    options = f"--steps 100000 --save-every 1 --keep-checkpoints 2 --output-dir {run}"
    process = start_processes(f"{line} {options}")
    wait_for_checkpoint(run)
    return process


def newest_step(run: Path) -> int:
    """Return the number of steps from which a run goes on."""
    newest = newest_checkpoint(run)
    assert newest
    return steps_done(newest)


@pytest.mark.parametrize("rank", [1])
def test_a_killed_process_ends_the_run_and_the_next_start_goes_on(rank, train, tmp_path):
    run = tmp_path / "run"
    process = start_long_run(train, run)
    os.kill(worker_pids(process.pid)[rank], signal.SIGKILL)
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 1
    assert f"rank      : {rank} (local_rank: {rank})" in errors
    assert "SIGKILL" in errors
    reached = newest_step(run)
    launch(f"{train} --output-dir {run} --steps {reached + 2}")
    steps = [row["step"] for row in read_metrics(run)]
    assert steps == list(range(1, reached + 3))


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_process_that_hangs_ends_the_run_and_is_named(rank, train, tmp_path, monkeypatch):
    monkeypatch.setenv("REMIXDIT_STEP_SECONDS", "5")
    process = start_long_run(train, tmp_path / "run")
    workers = worker_pids(process.pid)
    os.kill(workers[rank], signal.SIGSTOP)
    _, errors = process.communicate(timeout=5 + 60)
    assert process.returncode == 1
    assert f": error: process {rank} no longer answers; the same command resumes" in errors, errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_a_process_does_not_wait_for_others_for_ever(tmp_path, monkeypatch, capsys):
    facts = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    for name, fact in {**facts, "REMIXDIT_STEP_SECONDS": 1}.items():
        monkeypatch.setenv(name, str(fact))
    model = save_model(tmp_path / "model", seed=0)
    assert main(f"sample {model} --output {tmp_path}/images/".split()) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("remixdit: error: the processes have not met: ")


def test_workers_that_outlive_torchrun_keep_others_out(train, tmp_path, capsys):
    run = tmp_path / "run"
    process = start_long_run(train, run)
    workers = worker_pids(process.pid)
    for pid in workers:  # held, as in a long step: else they end at once
        os.kill(pid, signal.SIGSTOP)
    process.kill()
    line = f"{train} --output-dir {run} --steps 100000"
    message = refusal(line, capsys)
    assert message.startswith(f"output_dir must be that of one run at a time, got {run}, to which ")
    assert f"process {workers[0]} on " in message
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=60)  # ends when the workers close their stderr
    assert "stopped by the end of torchrun; saved" in errors
    reached = newest_step(run)
    launch(f"{train} --output-dir {run} --steps {reached + 2}")
    assert [row["step"] for row in read_metrics(run)] == list(range(1, reached + 3))


@pytest.mark.slow
def test_torchrun_starts_a_run_again_that_lost_a_process(train, tmp_path):
    line = f"{train} --steps 60 --save-every 1 --keep-checkpoints 2 --output-dir {tmp_path}"
    process = start_processes(f"{line}/run", meeting="--standalone --max-restarts 1")
    wait_for_checkpoint(tmp_path / "run")
    os.kill(worker_pids(process.pid)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"{tmp_path}/run goes on from step " in errors
    launch(f"{line}/whole")
    assert_equal_runs(tmp_path / "run", tmp_path / "whole", 60)
    assert files_below(tmp_path / "run") == files_below(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize("lost", [0])
def test_a_lost_host_ends_the_run(lost, train, tmp_path):
    port, run = free_port(), tmp_path / "run"
    options = f"--steps 100000 --save-every 1 --output-dir {run}"
    hosts = [start_host(f"{train} {options}", port) for _ in range(2)]
    wait_for_checkpoint(run)
    for pid in (*worker_pids(hosts[lost].pid), hosts[lost].pid):
        os.kill(pid, signal.SIGKILL)
    _, errors = hosts[1 - lost].communicate(timeout=60)
    assert hosts[1 - lost].returncode == 1, errors
    hosts[lost].communicate()
