"""A run stands for its newest weights, and commands say which step that is."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from remixdit.model.loading import find_model, load_model
from remixdit.model.model import RemixDiT
from remixdit.training.loop import train
from remixdit.training.presets import train_config
from tests.command_line import remixdit, write_folder

SAMPLING = "--num-images 2 --num-inference-steps 1"


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A run that ended at step 2, was begun again, and stopped after the checkpoint of step 4."""
    root = tmp_path_factory.mktemp("newest")
    data = write_folder(root / "photos", cat=8, dog=8)
    line = f"train tiny --data {data} --save-every 2 --log-every 1 --batch-size 8"
    remixdit(f"{line} --output-dir {root}/run --steps 2")
    assert find_model(root / "run").step == 2
    shutil.copytree(root / "run" / "model", root / "old")
    remixdit(f"{line} --output-dir {root}/run --steps 4")
    shutil.rmtree(root / "run" / "model")
    shutil.copytree(root / "old", root / "run" / "model")
    remixdit(f"{line} --output-dir {root}/plain --steps 2 --num-bases 1 --num-experts 1")
    return root


def test_a_checkpoint_is_newer_than_the_model_of_an_earlier_end(given):
    found = find_model(given / "run")
    assert (found.step, found.weights) == (4, "ema.safetensors")
    newest = load_file(given / "run" / "checkpoints" / "step-00000004" / "ema.safetensors")
    old = load_file(given / "old" / "model.safetensors")
    assert not all(newest[name].equal(values) for name, values in old.items())
    assert all(newest[n].equal(values) for n, values in load_model(given / "run").weights().items())


def test_a_run_starts_from_the_newest_weights_of_another(given, tmp_path):
    changes = {"init_from": str(given / "run"), "steps": 1, "batch_size": 8}
    config = train_config("tiny", data=given / "photos", output_dir=tmp_path / "a", **changes)
    list(train(config))
    changes["init_from"] += "/checkpoints/step-00000004"
    list(train(train_config("tiny", data=given / "photos", output_dir=tmp_path / "b", **changes)))
    one, two = (load_model(tmp_path / name).weights() for name in "ab")
    assert all(one[name].equal(values) for name, values in two.items())


@pytest.mark.parametrize(
    "command",
    [
        "sample {run} --output {out}.png " + SAMPLING,
        "sample {run}/checkpoints/step-00000004 --output {out}.png " + SAMPLING,
        "losses {run} --data {photos} --num-images 2 --num-intervals 2 --matrix-images 0",
        "plot {run} --output {out}",
        "info {run}",
        "info {run} --json",
        "export {run} --output {out} --expert 1",
        "train tiny --from {run} --data {photos} --output-dir {out} --steps 1",
    ],
)
def test_a_command_says_in_one_line_which_step_it_takes(command, given, tmp_path, capsys):
    places = {"run": given / "run", "photos": given / "photos", "out": tmp_path / "out"}
    capsys.readouterr()
    remixdit(command.format(**places))
    told = [line for line in capsys.readouterr().err.splitlines() if "weights of" in line]
    assert len(told) == 1
    assert told[0].startswith(f"remixdit: {given}/run")
    assert told[0].endswith(": averaged weights of step 4")


def test_the_last_weights_are_called_so(given, tmp_path, capsys):
    remixdit(f"export {given}/run --output {tmp_path}/out --expert 1 --no-ema")
    assert f"{given}/run: weights of step 4\n" in capsys.readouterr().err


def test_a_run_without_checkpoints_is_its_finished_model(given, tmp_path, capsys):
    shutil.copytree(given / "old", tmp_path / "run" / "model")
    remixdit(f"info {tmp_path}/run --json")
    printed = capsys.readouterr()
    assert printed.err.endswith(
        "averaged weights of the finished model, as there is no checkpoint\n"
    )
    assert json.loads(printed.out)["step"] is None
    remixdit(f"info {given}/old")
    assert capsys.readouterr().err == ""  # a model is what it is


def test_samples_on_disk_have_the_names_of_their_classes(given, tmp_path):
    from remixdit.evaluation.subjects import files_subject

    remixdit(f"sample {given}/run --output {tmp_path}/out/ {SAMPLING}")
    images = files_subject(f"{tmp_path}/out").images
    assert (images.class_names, images.class_labels.tolist()) == (("cat", "dog"), [0, 1])


def test_images_get_the_size_of_the_model_that_a_run_starts_from(given, tmp_path):
    line = f"train tiny --data {given}/photos --steps 1 --output-dir {tmp_path}"
    remixdit(f"{line}/small --image-size 8")
    remixdit(f"{line}/same --from {tmp_path}/small")  # not 16, the preset's
    remixdit(f"{line}/larger --from {tmp_path}/small --image-size 12")
    sizes = [load_model(tmp_path / name).config.network.input_size for name in ("same", "larger")]
    assert sizes == [8, 12]


def test_a_resumed_run_does_not_look_at_the_model_that_it_started_from(given, tmp_path, capsys):
    plain = RemixDiT.from_pretrained(given / "plain" / "model")
    plain.save_pretrained(tmp_path / "plain")
    line = f"train tiny --from {tmp_path}/plain --data {given}/photos --output-dir {tmp_path}/run"
    remixdit(f"{line} --steps 1")
    shutil.rmtree(tmp_path / "plain")
    remixdit(f"{line} --steps 2")
    assert "weights of" not in capsys.readouterr().err
