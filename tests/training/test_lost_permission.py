"""A directory that may not be written: one line, an exit code, and earlier files as they were."""

import os
import shutil
import subprocess
import sys

import pytest

from remixdit.model.loading import newest_checkpoint, steps_done
from remixdit.training.run import read_metrics
from tests.command_line import files_below, remixdit, save_model
from tests.processes import environment, wait_for_checkpoint

# Root may write anywhere, unless it starts a command without that capability.
AS_OTHERS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]

pytestmark = pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root needs setpriv"
)


def start(line: str) -> "subprocess.Popen[str]":
    """Start a command that writes only where it may."""
    words = [sys.executable, "-m", "remixdit", *line.split()]
    before = [] if os.geteuid() else AS_OTHERS
    return subprocess.Popen([*before, *words], stderr=subprocess.PIPE, text=True, env=environment())


def message_of(process: "subprocess.Popen[str]", code: int) -> str:
    """Wait for a command that fails; return its one sentence."""
    _, errors = process.communicate(timeout=100)
    assert process.returncode == code, errors
    *before, error = errors.splitlines()
    assert all(" goes on from step " in line for line in before), errors
    return error.removeprefix("remixdit: error: ")


def test_a_run_is_refused_where_nothing_can_be_written(data, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(0o555)
    process = start(f"train tiny --data {data} --output-dir {closed}/run")
    assert message_of(process, code=2) == f"output_dir must be writable, got {closed}/run"
    assert not files_below(closed)


def test_a_run_that_may_no_longer_save_keeps_what_it_has(data, tmp_path):
    run = tmp_path / "run"
    line = f"train tiny --data {data} --output-dir {run} --log-every 1 --save-every 2"
    process = start(f"{line} --steps 100000")
    wait_for_checkpoint(run)
    (run / "checkpoints").chmod(0o555)
    message = message_of(process, code=1)
    assert message.startswith(f"{run}/checkpoints/step-")
    assert message.endswith(": Permission denied")
    reached = steps_done(newest_checkpoint(run))
    message_of(start(f"{line} --steps 100000"), code=1)
    assert steps_done(newest_checkpoint(run)) == reached
    (run / "checkpoints").chmod(0o755)
    remixdit(f"{line} --steps {reached + 1}")
    assert [row["step"] for row in read_metrics(run)] == list(range(1, reached + 2))


@pytest.mark.parametrize("output", ["a.png", "a/"])
def test_images_that_may_not_be_written_are_refused(output, tmp_path):
    model, closed = save_model(tmp_path / "model", seed=0), tmp_path / "closed"
    closed.mkdir(0o555)
    line = f"sample {model} --output {closed}/{output} --num-images 2 --num-inference-steps 1"
    message = message_of(start(line), code=1)
    assert message.startswith(f"{closed}/")
    assert message.endswith(": Permission denied")
    assert not files_below(closed)
