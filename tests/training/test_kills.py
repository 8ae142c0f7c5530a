"""Runs that are killed at any moment, while a checkpoint is written too, lose nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from remixdit.training.run import read_metrics
from tests.command_line import files_below
from tests.processes import assert_equal_runs, environment

# Forks processes that train, so that none of them spends seconds on imports; kills them after a
# random time: all at once, as a machine does, or one, whose end must end the others.
KILLER = """
import os, random, signal, socket, sys, time
from pathlib import Path
from remixdit.cli.main import main
from remixdit.model.loading import newest_checkpoint, steps_done

line, directory, count, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
draw = random.Random(count)

def train(run, steps):
    return main(f"{line} --steps {steps} --output-dir {directory / run}".split())

def start(run, steps):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ.update({name: str(fact) for name, fact in facts.items()})
            os.environ["MASTER_ADDR"] = "localhost"
            os._exit(train(run, steps))
        children.append(child)
    return children

def codes(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

assert train("first", 2) == 0  # imports what it needs
began = time.monotonic()
assert codes(start("second", 4)) == [0] * count
longest = 2 * (time.monotonic() - began)
for kill in range(kills):
    children = start("run", 1_000_000)
    time.sleep(draw.uniform(0, longest))
    for child in draw.choice([children, children[:1], children[-1:]]):
        os.kill(child, signal.SIGKILL)
    found = codes(children)
    assert -9 in found and 0 not in found, found
newest = newest_checkpoint(directory / "run")
steps = 2 + (steps_done(newest) if newest else 0)
for run in ("run", "whole"):
    assert codes(start(run, steps)) == [0] * count
print(steps)
"""


def assert_kills_change_nothing(
    line: str, directory: Path, kills: int, num_processes: int = 1
) -> None:
    """Compare a run that was killed so many times with one that was not."""
    line += " --log-every 1 --save-every 1 --keep-checkpoints 2 --no-tensorboard"
    words = [sys.executable, "-c", KILLER, line, str(directory), str(num_processes), str(kills)]
    done = subprocess.run(
        words, capture_output=True, text=True, env=environment(), timeout=3000, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr
    assert "damaged" not in done.stderr, done.stderr
    run, whole, steps = directory / "run", directory / "whole", int(done.stdout)
    assert_equal_runs(run, whole, steps)
    assert [row["step"] for row in read_metrics(run)] == list(range(1, steps + 1))
    assert files_below(run) == files_below(whole)
    print(f"{kills} kills in {steps} steps")


def test_a_run_that_is_killed_equals_one_that_is_not(data, tmp_path):
    assert_kills_change_nothing(f"train tiny --data {data}", tmp_path, 5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("num_processes", "options"), [(1, ""), (2, ""), (2, "--shard")], ids=["one", "DDP", "FSDP2"]
)
def test_a_hundred_kills_change_nothing(num_processes, options, data, tmp_path):
    line = f"train tiny --data {data} {options}"
    assert_kills_change_nothing(line, tmp_path, 100, num_processes)
