"""Long work and its bars."""

import re
from collections.abc import Generator

import pytest

from remixdit.cli.terminal import follow
from remixdit.progress import Progress, finish


def counting(to: int) -> Generator[Progress, None, str]:
    for stage in ("read", "write"):
        for done in range(to + 1):
            yield Progress(stage, done, to, f"{done} so far")
    return "result"


def test_followed_work_returns_its_result():
    assert follow(counting(3)) == finish(counting(3)) == "result"


def test_each_stage_has_a_bar_with_its_unit(capsys, monkeypatch):
    monkeypatch.setattr("remixdit.cli.terminal.LINE_SECONDS", 0)
    follow(counting(2), {"read": "files"})
    lines = capsys.readouterr().err.splitlines()
    read, write = lines[1], lines[3]
    assert re.fullmatch(r"remixdit: read 2/2, 2 so far, [\d.,]+ files/s, 0:00:00 left", read)
    assert write == "remixdit: write 2/2, 2 so far, 0:00:00 left"


def test_work_that_fails_fails_in_the_open():
    def failing() -> Generator[Progress, None, None]:
        yield Progress("read", 0, 1)
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        follow(failing())
