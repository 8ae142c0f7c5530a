"""What tests of several processes share: how they start, and runs compared."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from remixdit.training.run import COEFFICIENTS_FILE, read_metrics

# Adam makes a step of full size of a gradient that is nothing but rounding, so eps is large.
OPTIONS = "--log-every 1 --steps 6 --ema-decay 0.5 --eps 1e-4 --basis-noise 0.3"
# name: options of a run; the tiny preset has K = 2 and N = 4
RUNS = {
    "one expert a step": "--experts-per-step 1",
    "two experts in micro-batches": "--experts-per-step 2 --micro-batch-size 3",
    "all experts in micro-batches": "--micro-batch-size 3 --recompute",
    "two experts a step": "--experts-per-step 2",
    "all experts a step": "--per-block --prior-strength 1e-2",
    "plain": "--num-bases 1 --num-experts 1 --timestep-strata 4",
    "one-hot": "--coefficients one_hot",
    "raw": "--coefficients raw --max-grad-norm 0.1",
    "muon": "--algorithm muon",
}


def command(
    line: str, num_processes: int, program: str = "-m remixdit", meeting: str = "--standalone"
) -> list[str]:
    """Return the words that start remixdit, or another program, on so many processes.

    Args:
        line: What follows the program.
        num_processes: One needs no torchrun, unless it meets others.
        program: A module or a script.
        meeting: Options of torchrun.
    """
    start = f"-m torch.distributed.run {meeting} --nproc-per-node {num_processes} "
    alone = num_processes == 1 and meeting == "--standalone"
    return [sys.executable, *f"{'' if alone else start}{program} {line}".split()]


def launch(
    line: str, num_processes: int = 2, code: int = 0, limit: float = 240, **start: str
) -> str:
    """Run a command on several processes; return what it wrote to stderr."""
    process = start_processes(line, num_processes, **start)
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers
        pytest.fail(f"{line} took over {limit} seconds: {process.communicate(timeout=60)[1]}")
    assert process.returncode == code, errors
    return errors


def start_processes(line: str, num_processes: int = 2, **start: str) -> "subprocess.Popen[str]":
    """Start a command on several processes, and do not wait."""
    words = command(line, num_processes, **start)
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment())


def start_host(line: str, port: int) -> "subprocess.Popen[str]":
    """Start one of two hosts with one process each, which meet on a port."""
    place = f"--rdzv-backend c10d --rdzv-endpoint localhost:{port} --local-addr localhost"
    return start_processes(line, 1, meeting=f"--nnodes 2 --rdzv-id run {place}")


def wait_for_checkpoint(run: Path) -> None:
    """Wait until a run has saved."""
    deadline = time.monotonic() + 60
    while not list((run / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def worker_pids(torchrun: int) -> list[int]:
    """Return the processes that torchrun started, in the order of their ranks."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    environments = {
        int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children
    }
    return sorted(environments, key=lambda pid: b"RANK=1" in environments[pid])


def environment() -> dict[str, str]:
    """Return the environment of every process: a thread each, and warnings are errors."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def assert_close_runs(run: Path, other: Path, step: int = 6, rtol: float = 1e-4) -> None:
    """Compare losses, weights and averages up to rounding."""
    ours, theirs = (read_metrics(path) for path in (run, other))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for name in ("loss", "grad_norm", "logits_task_grad"):
        found, expected = ([row[name] for row in rows] for rows in (ours, theirs))
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol**2, err_msg=name)
    for name in (f"checkpoints/step-{step:08}/model", f"checkpoints/step-{step:08}/ema"):
        found, expected = (load_file(path / f"{name}.safetensors") for path in (run, other))
        assert found.keys() == expected.keys()
        for key, values in found.items():
            torch.testing.assert_close(values, expected[key], rtol=rtol, atol=rtol / 100)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def assert_equal_runs(run: Path, other: Path, step: int = 20) -> None:
    """Compare all weights, averages and moments bit for bit, losses and coefficients."""
    names = [f"checkpoints/step-{step:08}/{part}" for part in ("model", "ema", "optimizer")]
    for name in (*names, "model/model"):
        ours, theirs = (load_file(path / f"{name}.safetensors") for path in (run, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    ours, theirs = ([(r["step"], r["loss"]) for r in read_metrics(path)] for path in (run, other))
    assert ours == theirs
    ours, theirs = (read_metrics(path, COEFFICIENTS_FILE) for path in (run, other))
    assert ours == theirs
