"""wandb and trackio get what TensorBoard gets, and never end a training."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from remixdit.training.run import read_metrics, stated_settings
from remixdit.training.trackers import check_installed
from tests.command_line import refusal, remixdit

OPTIONS = (
    "--log-every 1 --save-every 2 --sample-every 2 --sample-images 1 --sample-inference-steps 1 "
    "--no-tensorboard"
)


def train(data: Path, run: Path, tracker: str, steps: int, **variables: str) -> str:
    """Train in a process of its own; return what it wrote to stderr."""
    line = f"train tiny --data {data} --output-dir {run} --steps {steps} --tracker {tracker}"
    done = subprocess.run(
        [sys.executable, "-m", "remixdit", *f"{line} {OPTIONS}".split()],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def losses(run: Path) -> dict[int, float]:
    """Return the logged losses by step."""
    return {row["step"]: row["loss"] for row in read_metrics(run)}


def test_a_resumed_run_goes_on_with_its_run_of_trackio(data, tmp_path):
    pytest.importorskip("trackio")
    run = tmp_path / "run"
    for steps in (2, 4):
        train(data, run, "trackio", steps, TRACKIO_DIR=str(tmp_path / "board"))
    with sqlite3.connect(tmp_path / "board" / "remixdit.db") as database:
        rows = database.execute("select run_name, run_id, step, metrics from metrics").fetchall()
        config = json.loads(database.execute("select config from configs").fetchone()[0])
    database.close()
    found = [(step, json.loads(metrics)) for _, _, step, metrics in rows]
    assert len({(name, identity) for name, identity, _, _ in rows}) == 1
    assert {step: row["loss"] for step, row in found if "loss" in row} == losses(run)
    assert {"loss_by_interval/003", "grad_norm"} <= {name for _, row in found for name in row}
    for name, steps in (("coefficients", [1, 2, 3, 4]), ("samples", [2, 4])):
        pictures = {step: row[name]["file_path"] for step, row in found if name in row}
        assert sorted(pictures) == steps
        assert all((tmp_path / "board" / "media" / path).is_file() for path in pictures.values())
    assert config["mixture"] == stated_settings(run)["mixture"]


def test_a_resumed_run_goes_on_with_its_run_of_wandb(data, tmp_path):
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    for steps in (2, 4):
        train(data, run, "wandb", steps, WANDB_MODE="offline")
    first, second = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert first.name == second.name  # one run, once they are sent
    records = [*wandb_records(first), *wandb_records(second)]
    history = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item}
        for row in (record.history for record in records if record.HasField("history"))
    ]
    assert {row["_step"]: row["loss"] for row in history if "loss" in row} == losses(run)
    assert {"loss_by_interval/003", "coefficients/_type"} <= set(history[-1])
    pictures = list((run / "wandb").glob("offline-run-*/files/media/images/*.png"))
    kinds = [path.name.partition("_")[0] for path in pictures]
    assert (kinds.count("coefficients"), kinds.count("samples")) == (4, 2)
    (stated,) = {
        item.value_json
        for record in records
        if record.HasField("run")
        for item in record.run.config.update
        if item.key == "mixture"
    }
    assert json.loads(stated) == stated_settings(run)["mixture"]


def wandb_records(path: Path) -> Iterator:
    """Read the records that wandb keeps for later: parts in blocks of 32 KiB, as LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 2**15 - position % 2**15 < 7:  # no room for the header of a part
            position += 2**15 - position % 2**15
            continue
        size, kind = (
            int.from_bytes(content[position + 4 : position + 6], "little"),
            content[position + 6],
        )
        whole += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.mark.parametrize(
    ("tracker", "variables", "words"),
    [
        ("trackio", {"TRACKIO_DIR": "{}/file"}, "failed to flush metric logs"),  # its own words
        (
            "wandb",
            {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": "{}", "NETRC": "{}/none"},
            "remixdit: wandb cannot be written: No API key configured. Use `wandb login` to log "
            "in; training goes on",
        ),
    ],
)
def test_training_goes_on_where_the_tracker_cannot_begin(tracker, variables, words, data, tmp_path):
    pytest.importorskip(tracker)
    (tmp_path / "file").touch()
    given = {name: value.format(tmp_path) for name, value in variables.items()}
    assert train(data, tmp_path / "run", tracker, 2, **given).count(words) == 1
    assert list(losses(tmp_path / "run")) == [1, 2]


def test_training_goes_on_where_the_tracker_fails_later(data, tmp_path, capsys, monkeypatch):
    steps = []

    def log(values, step):
        steps.append(step)
        if step == 2:
            raise TimeoutError("no answer")

    tracker = SimpleNamespace(
        init=lambda **_: SimpleNamespace(log=log), Image=lambda pixels: pixels, finish=lambda: None
    )
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    monkeypatch.setattr("remixdit.training.loop.check_installed", lambda name: None)
    run = tmp_path / "run"
    remixdit(f"train tiny --data {data} --output-dir {run} --steps 4 {OPTIONS} --tracker trackio")
    warned, done, *following = capsys.readouterr().err.splitlines()
    assert following[0].startswith("remixdit sample ")
    assert warned == "remixdit: trackio cannot be written: no answer; training goes on"
    assert done.startswith("remixdit: trained 4 steps")
    assert steps == [1, 1, 2]
    assert list(losses(run)) == [1, 2, 3, 4]


def test_a_tracker_that_is_not_there_is_refused_before_work_begins(
    data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = f"train tiny --data {data} --output-dir {tmp_path}/run --tracker"
    assert refusal(f"{line} wandb", capsys) == (
        "tracker must be installed, got wandb, which is not: pip install 'remixdit[wandb]'"
    )
    assert refusal(f"{line} mlflow", capsys) == (
        "tracker must be one of wandb, trackio, got 'mlflow'"
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "runs_of_a_tracker").mkdir()  # as wandb leaves one of its own name
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="tracker must be installed, got runs_of_a_tracker"):
        check_installed("runs_of_a_tracker")
