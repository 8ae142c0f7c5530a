"""The script for SLURM, with a scheduler of a few lines in the place of SLURM."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from remixdit.model.loading import newest_checkpoint, steps_done
from remixdit.training.run import read_metrics
from tests.command_line import write_npz
from tests.processes import environment, free_port

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sh"
# Each starts what SLURM would: the names of the machines, and one task on each of them.
SCONTROL = '#!/bin/sh\nif [ "$1" = requeue ]; then echo "again: $2"; else echo localhost; fi\n'
SRUN = """#!/bin/sh
shift  # its own option
"$@" --local-addr localhost & first=$!
"$@" --local-addr localhost || exit 1
wait $first
"""
# The options of torchrun come before its -m, so this one is moved there.
TORCHRUN = f"""#!/usr/bin/env {sys.executable}
import sys
from torch.distributed.run import main
at = sys.argv.index("--local-addr")
main([*sys.argv[at : at + 2], *sys.argv[1:at]])
"""


def put_on_path(directory: Path, name: str, text: str) -> None:
    """Write a program."""
    (directory / name).write_text(text)
    (directory / name).chmod(0o755)


def submit(line: str, directory: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run the script as SLURM would, on two machines that are this one."""
    programs = directory / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("torchrun", TORCHRUN)):
        put_on_path(programs, name, text)
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "machine[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "MASTER_PORT": str(free_port()),
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    return subprocess.run(
        ["bash", str(SCRIPT), *line.split()],
        env={**environment(), **slurm, **variables},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
def test_the_script_trains_on_two_machines_and_asks_for_more_time(tmp_path):
    data, run = write_npz(tmp_path / "pictures.npz"), tmp_path / "run"
    line = f"tiny {data} {run} --log-every 1 --shard"
    end = {"SLURM_JOB_END_TIME": str(int(time.time()) + 600 + 15)}  # a job of 10 minutes 15 s
    done = submit(f"{line} --steps 1000000", tmp_path, **end)
    assert (done.returncode, done.stdout) == (0, "again: 7\n"), done.stderr
    reached = steps_done(newest_checkpoint(run))
    done = submit(f"{line} --steps {reached + 2}", tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, reached + 3))
    assert rows[0]["reduced_bytes"] > 0  # two processes have met


@pytest.mark.slow
def test_a_request_that_makes_no_sense_is_not_tried_again(tmp_path):
    data = write_npz(tmp_path / "pictures.npz")
    done = submit(f"tiny {data} {tmp_path}/run --steps 0", tmp_path)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "steps must be at least 1, got 0" in done.stderr
