"""The power fails at any moment of a run: what is not on the disk by then is gone.

Every file operation of a run is recorded. After each of them two disks are imagined: one that has
nothing but what was synced, and one that has every name but of the content only what was synced.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from remixdit.cli.main import main
from remixdit.training.run import read_metrics
from tests.command_line import remixdit
from tests.processes import assert_equal_runs

STEPS = 4
OPTIONS = f"--steps {STEPS} --save-every 1 --log-every 1 --keep-checkpoints 2 --no-tensorboard"
CHANGES = ("rename", "replace", "mkdir", "unlink", "rmdir")

Disk = dict[str, bytes | None]
"""Path => content; None for a directory."""


class Power:
    """What is on the disk below a directory, while this process writes there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[int, bytes] = {}  # inode => what was synced of a file
        self.names: dict[int, dict[str, int]] = {}  # inode => entries that were synced
        self.kinds: dict[int, bool] = {}  # inode => whether it is a directory
        self.held: list[int] = []  # open files, lest their inodes be given to others
        self.disks: list[tuple[Disk, Disk]] = []
        self.lock = threading.RLock()

    @contextmanager
    def recorded(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Record what happens meanwhile."""
        with monkeypatch.context() as patch:
            for name in (*CHANGES, "fsync"):
                patch.setattr(os, name, self.watched(name, getattr(os, name)))
            yield
        for descriptor in self.held:
            os.close(descriptor)

    def watched(self, name: str, call: object) -> object:
        def watching(*args: object, **options: object) -> object:
            with self.lock:
                result = call(*args, **options)
                if name == "fsync":
                    self.sync(args[0])
                self.fail()
                return result

        return watching

    def sync(self, descriptor: int) -> None:
        self.held.append(os.dup(descriptor))
        inode, path = os.fstat(descriptor).st_ino, Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.is_dir():
            self.names[inode] = self.entries(path)
        else:
            self.contents[inode] = path.read_bytes()

    def entries(self, directory: Path) -> dict[str, int]:
        found = {path.name: path for path in directory.iterdir()}
        self.kinds |= {path.stat().st_ino: path.is_dir() for path in found.values()}
        return {name: path.stat().st_ino for name, path in found.items()}

    def fail(self) -> None:
        """Imagine both disks."""
        synced: Disk = {}
        self.add_synced(synced, "", self.root.stat().st_ino)
        named: Disk = {}
        for path in sorted(self.root.rglob("*")):
            content = None if path.is_dir() else self.contents.get(path.stat().st_ino, b"")
            named[path.relative_to(self.root).as_posix()] = content
        self.disks.append((synced, named))

    def add_synced(self, disk: Disk, at: str, inode: int) -> None:
        for name, entry in self.names.get(inode, {}).items():
            disk[at + name] = None if self.kinds[entry] else self.contents.get(entry, b"")
            if self.kinds[entry]:
                self.add_synced(disk, f"{at}{name}/", entry)


def put(disk: Disk, root: Path) -> None:
    """Write what is on an imagined disk."""
    for name, content in sorted(disk.items()):
        if content is None:
            (root / name).mkdir(parents=True)
        else:
            (root / name).write_bytes(content)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run whose power does not fail, with all of its checkpoints."""
    run = tmp_path_factory.mktemp("whole") / "run"
    remixdit(f"train tiny --data {data} --output-dir {run} {OPTIONS} --keep-checkpoints 99")
    return run


@pytest.fixture(scope="module")
def pairs(data, tmp_path_factory) -> list[tuple[Disk, Disk]]:
    """What the disk may hold after each file operation of a run in a new directory."""
    root = tmp_path_factory.mktemp("power")
    power = Power(root)
    with pytest.MonkeyPatch.context() as monkeypatch, power.recorded(monkeypatch):
        remixdit(f"train tiny --data {data} --output-dir {root}/new/run {OPTIONS}")
    return power.disks


@pytest.fixture(scope="module")
def disks(pairs) -> list[Disk]:
    """All disks that differ from the one before."""
    found = [disk for kind in zip(*pairs, strict=True) for disk in kind]
    return [disk for number, disk in enumerate(found) if disk != found[number - 1]]


def steps_on(disk: Disk) -> list[int]:
    """Return the steps of the checkpoints on a disk."""
    found = (name.rpartition("checkpoints/step-")[2] for name in disk)
    return sorted(int(name) for name in found if name.isdecimal())


def test_every_checkpoint_that_has_its_name_is_whole(disks, whole):
    for disk in disks:
        for step in steps_on(disk):
            directory = f"checkpoints/step-{step:08}"
            for path in (whole / directory).iterdir():
                assert disk.get(f"new/run/{directory}/{path.name}") == path.read_bytes(), path


def test_the_lines_before_a_checkpoint_and_the_settings_are_there(disks, whole):
    for disk in disks:
        for step in steps_on(disk)[-1:]:
            assert json.loads(disk["new/run/config.json"])["steps"] == STEPS
            lines = disk["new/run/metrics.jsonl"].decode().splitlines()[:step]
            assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))
            assert "new/run/data/index.json" in disk


def test_no_checkpoint_is_lost_that_was_there(pairs):
    newest = 0
    for disk, _ in pairs:
        found = max(steps_on(disk), default=0)
        assert found >= newest
        newest = found
    assert newest == STEPS


def resumed(disk: Disk, data: Path, root: Path, whole: Path) -> None:
    """Resume from an imagined disk; the result must be that of the run that went through."""
    root.mkdir()
    put(disk, root)
    line = f"train tiny --data {data} --output-dir {root}/new/run {OPTIONS}"
    assert main(line.split()) == 0, sorted(disk)
    assert_equal_runs(root / "new" / "run", whole, STEPS)
    assert [row["step"] for row in read_metrics(root / "new" / "run")] == [*range(1, STEPS + 1)]


def test_a_run_goes_on_after_the_power_failed(disks, data, tmp_path, whole):
    for number in range(len(disks) // 8, len(disks), len(disks) // 4):
        resumed(disks[number], data, tmp_path / str(number), whole)


@pytest.mark.long
def test_a_run_goes_on_after_the_power_failed_at_any_moment(disks, data, tmp_path, whole):
    different = [disk for number, disk in enumerate(disks) if disk not in disks[:number]]
    for number, disk in enumerate(different):
        resumed(disk, data, tmp_path / str(number), whole)
    print(f"{len(different)} different disks")
