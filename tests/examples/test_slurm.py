"""The script for SLURM, with a scheduler of three lines in the place of SLURM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from remixdit.training.run import read_metrics
from tests.command_line import write_npz
from tests.processes import environment, free_port

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sh"
# Each starts what SLURM would: the names of the machines, and one task on each of them.
SCONTROL = "#!/bin/sh\necho localhost; echo localhost\n"
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


@pytest.mark.slow
def test_the_script_trains_on_two_machines(tmp_path):
    data, programs = write_npz(tmp_path / "pictures.npz"), tmp_path / "bin"
    programs.mkdir()
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
    options = "--steps 3 --log-every 1 --shard"
    done = subprocess.run(
        ["bash", str(SCRIPT), "tiny", str(data), str(tmp_path / "run"), *options.split()],
        env={**environment(), **slurm},
        stderr=subprocess.PIPE,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["reduced_bytes"] > 0  # two processes have met
