"""Several processes under torchrun, on the CPU: the same run as one, and no hang when one dies."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from remixdit.model.model import RemixDiT
from remixdit.training.run import read_metrics
from tests.command_line import files_below, remixdit
from tests.processes import (
    OPTIONS,
    RUNS,
    assert_close_runs,
    command,
    environment,
    free_port,
    launch,
)
from tests.tiny import tiny_dit


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A plain model in which all gradients flow, unlike in a new one."""
    directory = tmp_path_factory.mktemp("given") / "model"
    network = tiny_dit(input_size=16, patch_size=4, hidden_size=32, in_channels=3)
    RemixDiT.from_dit(network, 1, 1).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def train(data, given) -> str:
    """The start of the command that trains."""
    return f"train tiny --data {data} --from {given} {OPTIONS}"


def assert_processes_change_nothing(line: str, num_processes: int, directory: Path) -> None:
    """Compare a run of one process with one of several."""
    remixdit(f"{line} --output-dir {directory}/one")
    launch(f"{line} --output-dir {directory}/several", num_processes)
    assert_close_runs(directory / "one", directory / "several")


@pytest.mark.parametrize("name", ["one expert a step", "all experts at once", "plain"])
def test_two_processes_train_as_one_does(name, train, tmp_path):
    assert_processes_change_nothing(f"{train} {RUNS[name]}", 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("num_processes", [2, 4])
def test_any_number_of_processes_trains_as_one_does(name, num_processes, train, tmp_path):
    assert_processes_change_nothing(f"{train} {RUNS[name]}", num_processes, tmp_path)


@pytest.mark.slow
def test_bfloat16_networks_reduce_bfloat16_gradients(train, tmp_path):
    line = f"{train} --precision bf16 --mixed all --output-dir {tmp_path}"
    remixdit(f"{line}/one")
    launch(f"{line}/two")
    one, two = ([row["loss"] for row in read_metrics(tmp_path / run)] for run in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=2e-3)


@pytest.mark.parametrize(
    "counts",
    [(2, 1), *(pytest.param(counts, marks=pytest.mark.slow) for counts in ((1, 2), (2, 2)))],
    ids=str,
)
def test_a_run_goes_on_with_another_number_of_processes(counts, train, tmp_path):
    line = f"{train} --experts-per-step 2 --output-dir {tmp_path}"
    launch(f"{line}/whole", 2)
    launch(f"{line}/parts --steps 3", counts[0])
    launch(f"{line}/parts", counts[1])
    assert_close_runs(tmp_path / "whole", tmp_path / "parts")
    if counts == (2, 2):
        for part in ("model", "ema", "optimizer"):
            name = f"checkpoints/step-00000006/{part}.safetensors"
            whole, parts = ((tmp_path / run / name).read_bytes() for run in ("whole", "parts"))
            assert whole == parts


def reduced_bytes(line: str, run: Path) -> int:
    """Return the bytes of gradients that each of two processes hands over in a step."""
    launch(f"{line} --mixed all --steps 1 --output-dir {run}")
    return read_metrics(run)[-1]["reduced_bytes"]


@pytest.mark.slow
def test_a_step_reduces_the_gradients_of_one_network_for_each_of_min_m_k(data, tmp_path):
    line = f"train tiny --data {data}"
    plain = reduced_bytes(f"{line} --num-bases 1 --num-experts 1", tmp_path / "plain")
    assert plain > 100_000
    ways = {
        "one": ("--num-bases 4 --experts-per-step 1", 1),
        "two": ("--num-bases 4 --experts-per-step 2 --micro-batch-size 4", 2),
        "four": ("--num-bases 2", 2),
        "four in turn": ("--num-bases 2 --micro-batch-size 4", 2),
        "raw": ("--num-bases 2 --coefficients raw", 4),  # see StepGradients.begin_stacked_step
    }
    for name, (options, factor) in ways.items():
        extra = reduced_bytes(f"{line} {options}", tmp_path / name.replace(" ", "-"))
        assert 0 <= extra - factor * plain < 1000, name


def test_two_processes_encode_and_sample_what_one_does(data, given, tmp_path):
    for name, count in (("one", 1), ("two", 2)):
        launch(f"encode {data} --output {tmp_path}/{name} --image-size 16 --shard-size 5", count)
        sampled = f"sample {given} --output {tmp_path}/{name}-images/ --num-images 6 --batch-size 2"
        launch(f"{sampled} --num-inference-steps 3", count)
    for directories in (("one", "two"), ("one-images", "two-images")):
        one, two = (tmp_path / name for name in directories)
        assert files_below(one) == files_below(two)
        for name in files_below(one):
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batch-size 15", "batch_size must be a multiple of the 2 processes, got 15"),
        pytest.param("--data nowhere", ".*nowhere.*", marks=pytest.mark.slow),
        pytest.param("--steps 0", "steps must be at least 1, got 0", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_request_ends_in_one_line(options, message, data, tmp_path):
    errors = launch(f"train tiny --data {data} --output-dir {tmp_path}/run {options}", code=1)
    said = [line for line in errors.splitlines() if line.startswith("remixdit")]
    assert len([line for line in said if line != "remixdit FAILED"]) == 1, errors
    assert re.fullmatch(f"remixdit: error: {message}", said[0])
    assert "exitcode  : 2" in errors
    assert not (tmp_path / "run").exists()


def worker_pids(torchrun: int) -> list[int]:
    """Return the processes that torchrun started, in the order of their ranks."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    environments = {
        int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children
    }
    return sorted(environments, key=lambda pid: b"RANK=1" in environments[pid])


def start_long_run(line: str, run: Path) -> "subprocess.Popen[str]":
    """Start a run on two processes, and wait until it has a checkpoint."""
    options = f"--steps 100000 --save-every 1 --keep-checkpoints 2 --output-dir {run}"
    process = subprocess.Popen(
        command(f"{line} {options}", 2), stderr=subprocess.PIPE, text=True, env=environment()
    )
    wait_for_checkpoint(run)
    return process


def wait_for_checkpoint(run: Path) -> None:
    """Wait until a run has saved."""
    deadline = time.monotonic() + 60
    while not list((run / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_run_and_the_next_start_goes_on(rank, train, tmp_path):
    run = tmp_path / "run"
    process = start_long_run(train, run)
    os.kill(worker_pids(process.pid)[rank], signal.SIGKILL)
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 1
    assert f"rank      : {rank} (local_rank: {rank})" in errors
    assert "SIGKILL" in errors
    reached = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
    launch(f"{train} --output-dir {run} --steps {reached + 2}")
    steps = [row["step"] for row in read_metrics(run)]
    assert steps == list(range(1, reached + 3))


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run(train, tmp_path, monkeypatch):
    monkeypatch.setenv("REMIXDIT_HEARTBEAT_SECONDS", "1")
    process = start_long_run(train, tmp_path / "run")
    os.kill(worker_pids(process.pid)[1], signal.SIGSTOP)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "remixdit: error: process 0 ends, as process 1 no longer answers" in errors


def start_host(line: str, port: int) -> "subprocess.Popen[str]":
    """Start one of two hosts with one process each, which meet on a port."""
    meeting = f"--rdzv-backend c10d --rdzv-endpoint localhost:{port} --local-addr localhost"
    torchrun = f"-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-id run {meeting}"
    return subprocess.Popen(
        [sys.executable, *f"{torchrun} -m remixdit {line}".split()],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )


@pytest.mark.slow
def test_two_hosts_train_as_one_process_does(train, tmp_path):
    port = free_port()
    remixdit(f"{train} --output-dir {tmp_path}/one")
    hosts = [start_host(f"{train} --output-dir {tmp_path}/two", port) for _ in range(2)]
    for host in hosts:
        _, errors = host.communicate(timeout=120)
        assert host.returncode == 0, errors
    assert_close_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
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
