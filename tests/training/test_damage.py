"""Damaged checkpoints: found, named, and left for the one before; old ones still load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from remixdit.files import file_digest, locked
from remixdit.model.state import read_state
from tests.command_line import files_below, refusal, remixdit
from tests.processes import assert_equal_runs

FILES = ("config.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run of 6 steps with checkpoints of steps 2, 4 and 6."""
    run = tmp_path_factory.mktemp("whole") / "run"
    remixdit(f"{line_of(data, run)} --steps 6")
    return run


def line_of(data: Path, run: Path) -> str:
    """Return the start of the command that trains."""
    return f"train tiny --data {data} --output-dir {run} --log-every 1 --save-every 2"


def damaged_run(whole: Path, directory: Path, damage: Callable[[Path], None]) -> Path:
    """Return a copy of a run whose newest checkpoint is damaged."""
    run = directory / "run"
    shutil.copytree(whole, run)
    damage(run / "checkpoints/step-00000006")
    return run


def truncated(name: str) -> Callable[[Path], None]:
    """Cut a file short by two bytes."""
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:-2])


def flipped(name: str) -> Callable[[Path], None]:
    """Flip one bit in the data of a file."""

    def flip(directory: Path) -> None:
        content = bytearray((directory / name).read_bytes())
        content[-20] ^= 1
        (directory / name).write_bytes(content)

    return flip


def missing(name: str) -> Callable[[Path], None]:
    """Remove a file."""
    return lambda directory: (directory / name).unlink()


def swapped(directory: Path) -> None:
    """Let the weights and their average change places."""
    ema, model = directory / "ema.safetensors", directory / "model.safetensors"
    ema.rename(directory / "kept")
    model.rename(ema)
    (directory / "kept").rename(model)


def another_step(directory: Path) -> None:
    """Put a whole checkpoint of another step in its place."""
    shutil.rmtree(directory)
    shutil.copytree(directory.with_name("step-00000004"), directory)


DAMAGES = [
    *((name, way(name)) for name in FILES for way in (truncated, flipped, missing)),
    ("state.json", truncated("state.json")),
    ("state.json", flipped("state.json")),
    ("model.safetensors", swapped),
    ("state.json", another_step),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(
    name, damage, data, whole, tmp_path, capsys
):
    run = damaged_run(whole, tmp_path, damage)
    before = files_below(run)
    message = refusal(f"{line_of(data, run)} --steps 8", capsys)
    assert "step-00000006" in message
    assert name in message
    assert message.endswith("; --allow-older goes on from step 4")
    assert files_below(run) == before


def test_a_missing_state_is_named(data, whole, tmp_path, capsys):
    run = damaged_run(whole, tmp_path, missing("state.json"))
    assert "no state.json" in refusal(f"{line_of(data, run)} --steps 8", capsys)


def test_a_run_that_goes_on_from_an_older_checkpoint_equals_an_unbroken_one(
    data, whole, tmp_path, capsys
):
    run = damaged_run(whole, tmp_path, flipped("optimizer.safetensors"))
    flipped("model.safetensors")(run / "checkpoints/step-00000004")
    message = refusal(f"{line_of(data, run)} --steps 8", capsys)
    assert message.endswith("; --allow-older goes on from step 2")
    remixdit(f"{line_of(data, run)} --steps 6 --allow-older")
    assert "it is kept as damaged-step-00000006" in capsys.readouterr().err
    assert_equal_runs(run, whole, step=6)
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept[:2] == ["damaged-step-00000004", "damaged-step-00000006"]
    assert kept[2:] == ["step-00000002", "step-00000004", "step-00000006"]


def test_a_run_without_a_whole_checkpoint_is_left_as_it_is(data, whole, tmp_path, capsys):
    run = damaged_run(whole, tmp_path, flipped("model.safetensors"))
    for step in (2, 4):
        shutil.rmtree(run / f"checkpoints/step-0000000{step}")
    before = files_below(run)
    message = refusal(f"{line_of(data, run)} --steps 8 --allow-older", capsys)
    assert message.endswith("; no older one is whole")
    assert files_below(run) == before


def test_sampling_refuses_damaged_weights(whole, tmp_path, capsys):
    run = damaged_run(whole, tmp_path, flipped("ema.safetensors"))
    line = f"sample {run}/checkpoints/step-00000006 --output {tmp_path}/out.png --num-images 1"
    assert "ema.safetensors must have the sha256" in refusal(line, capsys)


def test_every_file_has_its_digest(whole):
    directory = whole / "checkpoints/step-00000006"
    state = read_state(directory)
    assert state.digests.keys() == {path.name for path in directory.iterdir()}
    for name in state.digests.keys() - {"state.json"}:
        assert state.digests[name] == file_digest(directory / name)


def test_checkpoints_without_digests_still_load(data, whole, tmp_path):
    run = damaged_run(whole, tmp_path, shutil.rmtree)
    (run / "checkpoints/step-00000004/state.json").write_text('{"step": 4}\n')
    remixdit(f"{line_of(data, run)} --steps 6")
    assert_equal_runs(run, whole, step=6)


def without_digests(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return a damage to a checkpoint of an earlier version."""

    def damage(directory: Path) -> None:
        (directory / "state.json").write_text('{"step": 6}\n')
        change(directory)

    return damage


def changed_tensor(
    name: str, key: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Path], None]:
    """Change one tensor of a file."""

    def damage(directory: Path) -> None:
        tensors = load_file(directory / name)
        tensors[key] = change(tensors[key]).contiguous()
        save_file(tensors, directory / name)

    return damage


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            changed_tensor("optimizer.safetensors", "exp_avg.logits", lambda v: v.sum()),
            "exp_avg.logits must have the shape (4, 2), got ()",
        ),
        (
            changed_tensor("model.safetensors", "logits", lambda v: v.double()),
            "logits must have the dtype torch.float32, got torch.float64",
        ),
        (
            changed_tensor("ema.safetensors", "logits", lambda v: v[:1]),
            "logits must have the shape (4, 2), got (1, 2)",
        ),
        (truncated("ema.safetensors"), "ema.safetensors must be a whole safetensors file"),
        (missing("ema.safetensors"), "no ema.safetensors"),
    ],
)
def test_a_checkpoint_without_digests_must_fit_the_model(
    damage, sentence, data, whole, tmp_path, capsys
):
    run = damaged_run(whole, tmp_path, without_digests(damage))
    assert sentence in refusal(f"{line_of(data, run)} --steps 8", capsys)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"step": 5}', "step of {} must be that of the directory's name, 6, got 5"),
        ('{"step": "6"}', "step of {} must be an integer, got '6'"),
        ("{}", "{} must state step, got none"),
        ('{"step": 6, "skipped_steps": 7}', "skipped_steps of {} must be in 0..6, got 7"),
        ('{"step": 6, "pace": 1}', "{} must hold known fields only, got 'pace'"),
        ("[" * 100_000, "{} must hold a JSON object, got '[[[["),
        ("[6]", "{} must hold a JSON object, got [6]"),
    ],
)
def test_a_state_is_validated(content, sentence, whole, tmp_path):
    directory = tmp_path / "step-00000006"
    shutil.copytree(whole / "checkpoints/step-00000006", directory)
    (directory / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"state\.json") as caught:
        read_state(directory)
    assert sentence.format(directory / "state.json") in str(caught.value)


def test_the_step_of_a_checkpoint_elsewhere_is_not_that_of_a_name(whole, tmp_path):
    shutil.copytree(whole / "checkpoints/step-00000006", tmp_path / "best")
    assert read_state(tmp_path / "best").step == 6
    assert json.loads((tmp_path / "best/state.json").read_text())["skipped_steps"] == 0


def test_a_run_that_another_process_is_writing_is_in_use_and_not_damaged(
    whole, data, tmp_path, capsys
):
    run = damaged_run(whole, tmp_path, missing("state.json"))
    before = files_below(run)
    for options in ("", " --allow-older"):
        with locked(run):
            message = refusal(f"{line_of(data, run)} --steps 8{options}", capsys)
        assert message.startswith(f"output_dir must be that of one run at a time, got {run}, to")
        assert files_below(run) == before
