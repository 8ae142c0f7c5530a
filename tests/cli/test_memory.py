"""How a training process keeps its memory."""

import os
import subprocess
import sys

import pytest

# Ten times, two arrays of 64 MB: the same memory each time, kept or given back.
TOUCH = """
import resource, torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    ones = torch.ones(16_000_000)
    twice = ones * 2
    del ones, twice
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
KEEP = "from remixdit.cli.memory import keep_memory; keep_memory()\n"
SHOW = """
import os, sys
from remixdit.cli.main import main
main()
print({name: os.environ.get(name) for name in NAMES})
"""
NAMES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "THP_MEM_ALLOC_ENABLE")
KEPT = dict(zip(NAMES, ("2147483647", "2147483647", "1"), strict=True))

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has mallopt")


def output_of(code: str, *args: str, **chosen: str) -> str:
    """Run code in a new process, with variables chosen by a user; return its last line."""
    environment = {name: v for name, v in os.environ.items() if name not in NAMES} | chosen
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def given_back() -> int:
    """Pages that are touched where memory is given back."""
    return int(output_of(TOUCH))


@on_linux
def test_freed_memory_is_taken_again_without_touching_its_pages_anew(given_back):
    assert 2 * int(output_of(KEEP + TOUCH)) < given_back
    assert given_back > 10 * 2 * 64e6 / 4096 / 2  # so this libc does give it back


@on_linux
def test_processes_that_it_starts_inherit_it(given_back):
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', CODE], check=True)"
    kept = int(output_of(KEEP + start.replace("CODE", repr(TOUCH))))
    assert 2 * kept < given_back


@on_linux
def test_what_the_user_chose_stays(given_back):
    chosen = {"MALLOC_MMAP_THRESHOLD_": "65536", "THP_MEM_ALLOC_ENABLE": "0"}
    assert 2 * int(output_of(KEEP + TOUCH, **chosen)) > given_back


@pytest.mark.parametrize(("command", "keeps"), [("train", True), ("sample", False)])
def test_commands_that_train_keep_their_memory(command, keeps):
    shown = output_of(SHOW.replace("NAMES", repr(NAMES)), command, "--help")
    assert shown == str(dict.fromkeys(NAMES, None) | (KEPT if keeps else {}))
