"""Long work and its bars."""

import json
import logging
import re
from collections.abc import Generator
from dataclasses import replace

import pytest

from remixdit.cli.main import main
from remixdit.cli.terminal import follow, say
from remixdit.progress import Progress, finish
from tests.command_line import remixdit, write_npz
from tests.tiny import tiny_model


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


ESCAPE = "\x1b]0;owned\x07\x9b31m"


def test_no_name_reaches_the_terminal_raw(tmp_path, capsys):
    write_npz(tmp_path / "a.npz", num_classes=2)
    remixdit(f"encode {tmp_path}/a.npz --output {tmp_path}/out --image-size 16")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    index["class_names"] = [ESCAPE, "a\nb"]
    index["source"]["name"] = ESCAPE
    index["skipped"] = [{"index": 0, "image": ESCAPE, "reason": f"no\n{ESCAPE}"}]
    (tmp_path / "out" / "index.json").write_text(json.dumps(index))
    remixdit(f"data check {tmp_path}/out")
    assert main(["data", "check", f"{tmp_path}/{ESCAPE}"]) == 2
    say(ESCAPE)
    logging.getLogger("remixdit.data").warning("left out: %s", ESCAPE)
    printed = capsys.readouterr()
    for line in (printed.out + printed.err).split("\n"):
        assert line.isprintable(), line
    assert "\\x1b]0;owned\\x07" in printed.out
    assert printed.err.count("\\x9b31m") == 3
    assert "a\\nb" in printed.out


def test_a_foreign_licence_is_one_printable_line(tmp_path, capsys):
    model = tiny_model()
    model.config = replace(model.config, license=f"mit\ntags: [x]{ESCAPE}")
    model.save_pretrained(tmp_path / "model")
    remixdit(f"info {tmp_path}/model")
    remixdit(f"info {tmp_path}/model --json")
    printed = capsys.readouterr().out
    assert "licence      mit\\ntags: [x]\\x1b" in printed
    assert all(line.isprintable() for line in printed.split("\n"))
