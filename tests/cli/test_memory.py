"""How a training process keeps its memory."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from remixdit.cli import memory
from remixdit.cli.main import main

# Forty times, two arrays: the same memory each time, kept or given back. Pages of the usual size
# (prctl 41: no huge ones), so that each that is touched anew counts.
TOUCH = """
import ctypes, resource, torch
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    blocks = [torch.ones(SIZE // 4) for _ in range(2)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
LARGE = TOUCH.replace("SIZE", str(2**26))  # bytes, above what glibc keeps of its own accord
SMALL = TOUCH.replace("SIZE", str(2**22))
KEEP = "from remixdit.cli.memory import keep_memory; keep_memory()\n"
SHOW = """
import os, sys
from remixdit.cli.main import main
main()
print({name: os.environ.get(name) for name in NAMES})
"""
NAMES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "THP_MEM_ALLOC_ENABLE")
OTHERS = ("GLIBC_TUNABLES", "LD_PRELOAD")

new_glibc = pytest.mark.skipif(
    [int(part) for part in platform.libc_ver()[1].split(".")[:2] if part] < [2, 35],
    reason="blocks above 32 MiB are given back before glibc 2.35",
)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has mallopt"),
    pytest.mark.skipif(memory.GPU.exists(), reason="left alone with a GPU"),
]


def output_of(code: str, *args: str, **chosen: str) -> str:
    """Run code in a new process, with variables chosen by a user; return its last line."""
    environment = {name: v for name, v in os.environ.items() if name not in NAMES + OTHERS} | chosen
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def given_back() -> int:
    """Pages that are touched where memory is given back."""
    return int(output_of(LARGE))


@new_glibc
def test_freed_memory_is_taken_again_without_touching_its_pages_anew(given_back):
    assert 2 * int(output_of(KEEP + LARGE)) < given_back


@new_glibc
def test_processes_that_it_starts_inherit_it(given_back):
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', CODE], check=True)"
    kept = int(output_of(KEEP + start.replace("CODE", repr(LARGE))))
    assert 2 * kept < given_back


def test_an_older_glibc_is_not_made_worse():
    # It refuses a threshold above 32 MiB. Only not to trim would map every small block anew.
    older = "from remixdit.cli import memory; memory.LARGEST_BLOCKS = (2**25,)\n"
    pages = 40 * 2 * 2**22 // resource.getpagesize()
    assert int(output_of(older + KEEP + SMALL)) < pages / 2
    assert int(output_of(SMALL, MALLOC_TRIM_THRESHOLD_=str(2**31 - 1))) > pages / 2


@pytest.mark.parametrize(
    "chosen",
    [
        {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"},
    ],
)
def test_what_the_user_chose_stays(chosen, given_back):
    assert 2 * int(output_of(KEEP + LARGE, **chosen)) > given_back


@pytest.mark.parametrize(("command", "keeps"), [("train", True), ("sample", False)])
def test_commands_that_train_keep_their_memory(command, keeps):
    shown = output_of(SHOW.replace("NAMES", repr(NAMES)), command, "--help")
    assert (str(None) not in shown) is keeps
    assert ("'THP_MEM_ALLOC_ENABLE': '1'" in shown) is keeps


def test_a_call_in_another_program_changes_nothing_of_it(monkeypatch, capsys):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert main(["train", "--help"]) == 0
    assert not set(NAMES) & set(os.environ)


def test_it_is_left_alone_with_a_gpu(monkeypatch, tmp_path: Path):
    for name in NAMES + OTHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory, "GPU", tmp_path)
    memory.keep_memory()
    assert not set(NAMES) & set(os.environ)
