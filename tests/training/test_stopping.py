"""Runs that end early save first, say how they go on, and lose nothing."""

import json
import os
import shlex
import signal
import threading
import time
from pathlib import Path

import pytest

from remixdit.cli.main import main
from remixdit.cli.next_steps import remixdit_command, torchrun
from remixdit.cli.signals import stopped_by_signals
from remixdit.model.loading import newest_checkpoint, steps_done
from remixdit.training.config import seconds_of
from remixdit.training.run import read_metrics
from remixdit.training.stopping import Stop
from tests.command_line import refusal, remixdit
from tests.processes import assert_equal_runs, launch, start_processes, worker_pids

LONG = "--steps 100000 --save-every 100000 --log-every 1 --no-tensorboard"


def wait_for_metrics(run: Path, lines: int = 2) -> None:
    """Wait until a run has taken some steps."""
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").is_file() or len(read_metrics(run)) < lines:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def signal_after_steps(number: int, run: Path) -> None:
    """Send this process a signal when a run of its own has taken two steps."""

    def send() -> None:
        wait_for_metrics(run)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


def resumed_command(error: str) -> str:
    """Return the command to go on that the last line names."""
    return error.splitlines()[-1].removeprefix(f"{remixdit_command()} ")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_signal_saves_and_the_printed_command_goes_on(number, code, data, tmp_path, capsys):
    run, whole = tmp_path / "a run", tmp_path / "whole"
    handler = signal.getsignal(number)
    signal_after_steps(number, run)
    options = ["train", "tiny", "--data", str(data), "--output-dir", str(run), *LONG.split()]
    assert main(options) == code
    assert signal.getsignal(number) is handler
    error = capsys.readouterr().err
    newest = newest_checkpoint(run)
    assert newest
    assert f"stopped by {signal.Signals(number).name}; saved {newest}; next:\n" in error
    assert error.count("\n") == 2
    assert not (run / "model").exists()
    steps = steps_done(newest) + 2
    assert main([*shlex.split(resumed_command(error)), "--steps", str(steps)]) == 0
    error = capsys.readouterr().err
    assert f"{run} goes on from step {steps - 2} of {steps}" in error
    assert f"trained {steps} steps; the model is {run}/model; next:\n" in error
    remixdit(f"train tiny --data {data} --output-dir {whole} {LONG} --steps {steps}")
    assert_equal_runs(run, whole, steps)


def test_time_ends_a_run_and_saves_in_between(data, tmp_path, capsys):
    line = f"train tiny --data {data} --output-dir {tmp_path}/run {LONG}"
    assert main(f"{line} --stop-after 2s --save-minutes 0.002".split()) == 75
    assert "stopped by --stop-after 2s; saved" in capsys.readouterr().err
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) > 1


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [("", 0), ("3h50m", 13800), ("90s", 90), ("1d", 86400), ("1d2h3m4s", 93784)],
)
def test_durations_are_read(duration, seconds):
    assert seconds_of(duration) == seconds


@pytest.mark.parametrize("duration", ["3", "h", "3h5", "50m3h", "-1h", "0s", "1.5h"])
def test_other_words_are_no_duration(duration, data, tmp_path, capsys):
    line = f"train tiny --data {data} --output-dir {tmp_path}/run --stop-after={duration}"
    assert refusal(line, capsys) == (
        f"stop_after must be a time such as 3h50m, 45m or 90s, got {duration!r}"
    )


def test_a_second_interrupt_ends_at_once():
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        hang(writer)
    assert os.read(reader, 1) == b"1"
    for _ in range(2):  # the first asks, one that follows at once is the same, passed on
        os.kill(child, signal.SIGINT)
        time.sleep(0.3)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    time.sleep(0.8)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def hang(writer: int) -> None:
    """Take a step that does not end."""
    stop = Stop()
    stop.waits = True
    with stopped_by_signals(stop):
        os.write(writer, b"1")
        time.sleep(60)
    os._exit(1)


def test_two_processes_agree_on_a_signal_to_one_of_them(data, tmp_path, capsys):
    run = tmp_path / "run"
    line = f"train tiny --data {data} --output-dir {run}"
    process = start_processes(f"{line} {LONG} --shard")
    wait_for_metrics(run)
    message = refusal(line, capsys)
    holder = worker_pids(process.pid)[0]
    assert message.startswith(f"output_dir must be that of one run at a time, got {run}, to which ")
    assert f"process {holder} on " in message
    os.kill(worker_pids(process.pid)[1], signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    newest = newest_checkpoint(run)
    assert newest
    assert (
        f"stopped by a signal to another process; saved {newest}; next:\n{torchrun(2)} train tiny"
        in errors
    )
    assert "exitcode  : 75" in errors
    assert [row["step"] for row in read_metrics(run)] == list(range(1, steps_done(newest) + 1))


@pytest.mark.slow
def test_workers_save_and_end_when_torchrun_is_killed(data, tmp_path):
    run = tmp_path / "run"
    process = start_processes(f"train tiny --data {data} --output-dir {run} {LONG}")
    wait_for_metrics(run)
    process.kill()
    _, errors = process.communicate(timeout=60)  # ends when the workers close their stderr
    assert "stopped by the end of torchrun; saved" in errors
    newest = newest_checkpoint(run)
    assert newest
    steps = steps_done(newest) + 2
    launch(f"train tiny --data {data} --output-dir {run} --log-every 1 --steps {steps}")
    assert [row["step"] for row in read_metrics(run)] == list(range(1, steps + 1))


def test_old_runs_do_not_state_how_they_are_stopped(data, tmp_path):
    line = f"train tiny --data {data} --output-dir {tmp_path}/run --log-every 1"
    remixdit(f"{line} --steps 1")
    path = tmp_path / "run" / "config.json"
    settings = json.loads(path.read_text())
    del settings["output"]["save_minutes"], settings["output"]["stop_after"]
    path.write_text(json.dumps(settings))
    remixdit(f"{line} --steps 2 --save-minutes 1 --stop-after 9h")


def test_a_study_is_refused_under_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refusal("study table2", capsys)
    assert message == "study must run in one process, without torchrun, got 2 processes"
