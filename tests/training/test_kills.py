"""Runs that are killed at any moment, while a checkpoint is written too, lose nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from remixdit.training.run import read_metrics
from tests.command_line import files_below
from tests.processes import assert_equal_runs, environment

# Forks processes that train, so that none of them spends seconds on imports; kills them after a
# random time: all at once, as a machine does, or one, whose end must end the others. Several have a
# parent that holds the store through which they meet, as torchrun is; it may be killed too.
KILLER = """
import ctypes, os, random, signal, sys, time
from contextlib import suppress
from pathlib import Path
from remixdit.cli.main import main
from remixdit.model.loading import newest_checkpoint, steps_done
from tests.processes import free_port

line, directory, count, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
draw = random.Random(count)
PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0

def train(run, steps):
    return main(f"{line} --steps {steps} --output-dir {directory / run}".split())

def fork(job, *facts):
    child = os.fork()
    if not child:
        os._exit(job(*facts))
    return child

def work(rank, port, run, steps):
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(fact) for name, fact in facts.items()})
    os.environ |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return train(run, steps)

def lead(writer, run, steps):
    port = free_port()
    workers = [fork(work, rank, port, run, steps) for rank in range(count)]
    os.write(writer, " ".join(map(str, workers)).encode())
    if count > 1:
        from torch.distributed import TCPStore
        store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in workers)

def start(run, steps):
    reader, writer = os.pipe()
    leader = fork(lead, writer, run, steps)
    workers = list(map(int, os.read(reader, 100).split()))
    for descriptor in (reader, writer):
        os.close(descriptor)
    return leader, workers

def codes():
    found = []
    with suppress(ChildProcessError):
        while True:
            found.append(os.waitstatus_to_exitcode(os.wait()[1]))
    return found

assert train("first", 2) == 0  # imports what it needs
began = time.monotonic()
start("second", 4)
assert codes() == [0]
longest = 2 * (time.monotonic() - began)
for kill in range(kills):
    leader, workers = start("run", 1_000_000)
    time.sleep(draw.uniform(0, longest))
    for child in draw.choice([workers, workers[:1], workers[-1:], [leader]][: 2 + count]):
        os.kill(child, signal.SIGKILL)
    found = codes()
    assert 0 not in found, found
newest = newest_checkpoint(directory / "run")
steps = 2 + (steps_done(newest) if newest else 0)
for run in ("run", "whole"):
    start(run, steps)
    assert codes() == [0]
print(steps)
"""


def assert_kills_change_nothing(
    line: str, directory: Path, kills: int, num_processes: int = 1
) -> None:
    """Compare a run that was killed so many times with one that was not."""
    line += " --log-every 1 --save-every 1 --keep-checkpoints 2 --no-tensorboard --sample-every 0"
    words = [sys.executable, "-c", KILLER, line, str(directory), str(num_processes), str(kills)]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        env={
            **environment(),
            "REMIXDIT_STEP_SECONDS": "10",
        },  # who is killed is not waited for long
        cwd=Path(__file__).parents[2],
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr
    assert "damaged" not in done.stderr, done.stderr
    run, whole, steps = directory / "run", directory / "whole", int(done.stdout)
    assert_equal_runs(run, whole, steps)
    assert [row["step"] for row in read_metrics(run)] == list(range(1, steps + 1))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == steps
    assert files_below(run) == files_below(whole)
    print(f"{kills} kills in {steps} steps")


def test_a_run_that_is_killed_equals_one_that_is_not(data, tmp_path):
    assert_kills_change_nothing(f"train tiny --data {data}", tmp_path, 5)


@pytest.mark.parametrize("options", ["", "--shard"], ids=["DDP", "FSDP2"])
def test_two_processes_that_are_killed_equal_two_that_are_not(options, data, tmp_path):
    assert_kills_change_nothing(f"train tiny --data {data} {options}", tmp_path, 3, 2)


@pytest.mark.long
@pytest.mark.parametrize(
    ("num_processes", "options"), [(1, ""), (2, ""), (2, "--shard")], ids=["one", "DDP", "FSDP2"]
)
def test_a_hundred_kills_change_nothing(num_processes, options, data, tmp_path):
    line = f"train tiny --data {data} {options}"
    assert_kills_change_nothing(line, tmp_path, 100, num_processes)
