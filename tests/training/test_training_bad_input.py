"""Every wrong request for a run: one sentence, exit code 2, nothing half-written."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from remixdit.training.presets import PRESETS
from tests.command_line import (
    files_below,
    pixels,
    refusal,
    remixdit,
    write_folder,
    write_npz,
)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Data, and finished runs on colour and on grey."""
    root = tmp_path_factory.mktemp("given")
    for name, channels in (("colour", 3), ("grey", 1)):
        data = write_npz(root / f"{name}.npz", channels=channels)
        remixdit(f"train tiny --data {data} --output-dir {root / name} --steps 2")
    return root


def refused_run(given, tmp_path, capsys, options: str) -> str:
    """Ask for a run that must be refused without a trace."""
    run = tmp_path / "run"
    line = f"train tiny --data {given}/colour.npz --output-dir {run} {options}"
    message = refusal(line, capsys)
    assert not run.exists()
    return message


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--num-bases 0", "num_bases must be at least 1, got 0"),
        ("--num-experts 0", "num_experts must be at least 1, got 0"),
        (
            "--num-bases 5",
            "num_bases must be at most num_experts 4, got 5: N experts are at most N different "
            "networks, so bases beyond N add only memory",
        ),
        ("--num-bases two", "--num-bases must be an integer, got 'two'"),
        (
            "--learning-rat 1",
            "Unrecognized options: --learning-rat, 1; perhaps --learning-rate",
        ),
        ("--experts-per-step 9", "experts_per_step must be in 0..4, got 9"),
        ("--steps 0", "steps must be at least 1, got 0"),
        ("--image-size 0", "image_size must be at least 8, got 0"),
        ("--micro-batch-size -1", "micro_batch_size must be at least 0, got -1"),
        ("--sample-every -1", "sample_every must be at least 0, got -1"),
        ("--timestep-strata -1", "timestep_strata must be at least 0, got -1"),
        (
            "--batch-size 3",
            "batch_size must be at least one image for each of 4 intervals a step, got 3",
        ),
        ("--precision fp8", "precision must be fp32 or bf16, got 'fp8'"),
        ("--device tpu", "device must be auto, cpu or cuda, got 'tpu'"),
        ("--coefficients hard", "coefficients must be one of softmax, raw, one_hot, got 'hard'"),
        ("--patch-size 5", "patch_size must divide input_size 16, got 5"),
        ("--lr-schedule step", "lr_schedule must be constant or cosine, got 'step'"),
    ],
)
def test_wrong_field_is_named_with_rule_and_value(options, sentence, given, tmp_path, capsys):
    assert refused_run(given, tmp_path, capsys, options) == sentence


def test_a_pattern_that_matches_nothing_is_told_what_there_is(given, tmp_path, capsys):
    message = refused_run(given, tmp_path, capsys, "--mixed head")
    assert message.startswith("mixed must match a trainable parameter, got head; this DiT has ")
    assert "blocks.*.attn.qkv.weight" in message


def test_unknown_preset_is_named_beside_those_there_are(given, tmp_path, capsys):
    line = f"train tinny --data {given}/colour.npz --output-dir {tmp_path}/run"
    message = refusal(line, capsys)
    assert message.startswith("preset must be one of tiny, ")
    assert message.endswith("got 'tinny'; perhaps tiny")
    assert "preset must come first" in refusal(f"train --data {given}/colour.npz tiny", capsys)


def test_missing_flags_are_named(capsys):
    assert refusal("train tiny", capsys) == (
        "required: --data STR, --output-dir PATH (remixdit train tiny --help says more)"
    )


def test_a_typo_is_named_before_missing_flags(capsys):
    assert refusal("train tiny --stps 5", capsys) == (
        "Unrecognized options: --stps, 5; perhaps --steps; required: --data STR, --output-dir PATH"
    )


def test_names_and_summaries_of_presets_are_apart(capsys):
    remixdit("train --help")
    printed = capsys.readouterr().out
    assert all(f"\n  {name}  " in printed for name in PRESETS)


# --- data


def refused_data(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    run = tmp_path / "run"
    message = refusal(f"train tiny --data {data} --output-dir {run}", capsys)
    assert not run.exists()
    return message


def test_missing_data_are_named(tmp_path, capsys):
    gone = tmp_path / "no" / "such"
    assert refused_data(gone, tmp_path, capsys).startswith(f"{gone}: no such file or folder")


def test_folder_without_images_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    message = refused_data(tmp_path / "empty", tmp_path, capsys)
    assert message == f"{tmp_path}/empty holds no images"


def test_folder_with_one_class_is_refused(tmp_path, capsys):
    data = write_folder(tmp_path / "photos", cat=3)
    message = refused_data(data, tmp_path, capsys)
    assert message == f"{data} holds the one class folder 'cat': give {data}/cat instead"


def test_negative_labels_are_refused(tmp_path, capsys):
    data = tmp_path / "labels.npz"
    np.savez(data, arr_0=pixels(8), arr_1=np.arange(8) - 3)
    assert refused_data(data, tmp_path, capsys).endswith("got -3")


def test_corrupt_image_is_left_out_of_a_run_and_named(tmp_path, capsys):
    data = write_folder(tmp_path / "photos", cat=9, dog=9)
    (data / "cat" / "broken.png").write_bytes(b"no picture")
    remixdit(f"train tiny --data {data} --output-dir {tmp_path}/run --steps 1")
    printed = capsys.readouterr().err
    assert "1 of 19 images" in printed
    assert "cat/broken.png" in printed


def test_corrupt_image_is_refused_by_strict_encoding(tmp_path, capsys):
    data = write_folder(tmp_path / "photos", cat=3, dog=3)
    (data / "cat" / "broken.png").write_bytes(b"no picture")
    line = f"encode {data} --output {tmp_path}/shards --image-size 16"
    assert "cat/broken.png" in refusal(f"{line} --strict", capsys)
    remixdit(line)
    assert "1 of 7 images were skipped" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["run", "runs/new/run"])
def test_corrupt_image_is_refused_by_a_strict_run_without_a_trace(place, tmp_path, capsys):
    data = write_folder(tmp_path / "photos", cat=9, dog=9)
    (data / "cat" / "broken.png").write_bytes(b"no picture")
    line = f"train tiny --data {data} --output-dir {tmp_path}/{place} --steps 1"
    message = refusal(f"{line} --strict", capsys)
    assert message.startswith("cat/broken.png: the file is of no known image format (JPEG, PNG, ")
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}
    remixdit(line)
    message = refusal(f"{line} --strict", capsys)  # also when it was left out before
    assert message.startswith("data must hold no image that cannot be read when strict: 1 of 19")
    (data / "cat" / "broken.png").unlink()
    remixdit(f"train tiny --data {data} --output-dir {tmp_path}/whole --steps 1 --strict")


def test_data_without_a_readable_image_leave_no_trace(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "broken.png").write_bytes(b"no picture")
    message = refused_data(tmp_path / "photos", tmp_path, capsys)
    assert message.startswith("no image of photos can be read, such as cat/broken.png")


# --- models to start from


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--from {}/grey", "in_channels must be that of --from, 1, got 3"),
        ("--from {}/colour --num-bases 3", "num_bases must be that of --from, 2, got 3"),
        ("--from {}/colour --coefficients raw", "coefficients must be that of --from, softmax"),
        (
            "--from {}/colour --prediction-type v_prediction",
            "--prediction-type must be that of --from, epsilon, or be left out, got v_prediction",
        ),
        ("--from {}/grey/data", "--from: checkpoint must be a model directory or a run with one"),
        ("--from {}/nowhere", "--from must be a model directory, a run or owner/name"),
    ],
)
def test_start_of_another_shape_is_refused(options, sentence, given, tmp_path, capsys):
    assert refused_run(given, tmp_path, capsys, options.format(given)).startswith(sentence)


def test_model_of_other_classes_is_refused_unless_labels_are_learned_afresh(
    given, tmp_path, capsys
):
    plain = tmp_path / "plain"
    options = "--steps 1 --num-bases 1 --num-experts 1"
    remixdit(f"train tiny --data {given}/colour.npz --output-dir {plain} {options}")
    data = write_folder(tmp_path / "photos", cat=9, dog=9)
    line = f"train tiny --data {data} --output-dir {tmp_path}/run --from {plain} --steps 1"
    message = refusal(line, capsys)
    assert message.startswith("classes of the data must be the 3 of --from, got 2; --new-labels")
    assert not (tmp_path / "run").exists()
    remixdit(f"{line} --new-labels")


def test_damaged_model_is_refused_by_its_directory(given, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(given / "colour" / "model", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    message = refused_run(given, tmp_path, capsys, f"--from {model}")
    assert message.startswith(f"model must have whole files, got {model}: ")


# --- where it goes


def test_output_of_another_configuration_is_refused_by_fields(given, tmp_path, capsys):
    before = files_below(given / "colour")
    line = f"train tiny --data {given}/colour.npz --output-dir {given}/colour --steps 2"
    message = refusal(f"{line} --learning-rate 1e-5 --batch-size 8", capsys)
    assert message == (
        f"output_dir must hold a run of this configuration, got {given}/colour: "
        "batch_size was 16, now 8; optimizer.learning_rate was 0.001, now 1e-05"
    )
    assert files_below(given / "colour") == before


def test_of_many_differences_three_are_named(given, capsys):
    line = f"train tiny --data {given}/colour.npz --output-dir {given}/colour --steps 2"
    changes = "--batch-size 8 --learning-rate 1e-5 --seed 3 --label-dropout 0.5 --ema-decay 0.5"
    message = refusal(f"{line} {changes}", capsys)
    assert message.endswith("; and 2 more")
    assert message.count(" was ") == 3


def test_too_little_memory_is_said_with_what_needs_less(given, tmp_path, capsys):
    line = f"train tiny --data {given}/colour.npz --output-dir {tmp_path}/run --steps 1"
    message = refusal(f"{line} --hidden-size 2000000", capsys, code=1)
    assert message.startswith("too little memory: --micro-batch-size, --batch-size, --recompute")
    assert not (tmp_path / "run").exists()


def test_changed_data_are_refused(tmp_path, capsys):
    data = write_npz(tmp_path / "data.npz")
    line = f"train tiny --data {data} --output-dir {tmp_path}/run"
    remixdit(f"{line} --steps 1")
    write_npz(data, count=32)
    assert "holds another encoding" in refusal(f"{line} --steps 2", capsys)


def test_directory_of_something_else_is_refused(given, tmp_path, capsys):
    photos = write_folder(tmp_path / "run", cat=1)
    line = f"train tiny --data {given}/colour.npz --output-dir {photos}"
    assert refusal(line, capsys) == f"output_dir must be empty or hold a run, got {photos}"
    assert files_below(photos) == {"cat", "cat/0.png"}


def test_run_inside_of_the_images_is_refused(tmp_path, capsys):
    """It would count as a class of theirs, and no other run could read them."""
    photos = write_folder(tmp_path / "photos", cat=3, dog=3)
    before = files_below(photos)
    for line in (
        f"train tiny --data {photos} --output-dir {photos}/run",
        f"encode {photos}/ --output {photos}/new/../shards --image-size 16",
    ):
        assert refusal(line, capsys).startswith(
            f"output must lie outside of the images in {photos}, got {photos}/"
        )
    assert files_below(photos) == before


def test_run_beside_shards_is_accepted(tmp_path):
    write_npz(tmp_path / "pictures.npz")
    remixdit(f"encode {tmp_path}/pictures.npz --output {tmp_path}/shards --image-size 16")
    remixdit(f"train tiny --data {tmp_path}/shards --output-dir {tmp_path}/shards/run --steps 1")


DAMAGE = {
    "config.json": (b"garbage", "{run}/config.json must hold a JSON object, got 'garbage': "),
    "data/index.json": (b"garbage", "{run}/data/index.json is no index of shards: "),
    "data/latents-00000.npy": (None, "shard {run}/data/latents-00000.npy cannot be read: "),
    "checkpoints/step-00000002/state.json": (
        b"{}",
        "{run}/checkpoints/step-00000002/state.json must state step, got none",
    ),
    "checkpoints/step-00000002/ema.safetensors": (
        b"",
        "{run}/checkpoints/step-00000002/ema.safetensors must have the sha256",
    ),
    "checkpoints/step-00000002": (None, "{whole}/checkpoints/step-00000002: no state.json"),
}


def test_settings_nested_too_deep_are_refused(given, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(given / "colour", run)
    (run / "config.json").write_text("[" * 100_000)
    line = f"train tiny --data {given}/colour.npz --output-dir {run} --steps 3"
    assert refusal(line, capsys).startswith(f"{run}/config.json must hold a JSON object, got '[[[")


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_run_is_refused_by_what_is_damaged(name, given, tmp_path, capsys):
    run, (content, sentence) = tmp_path / "run", DAMAGE[name]
    shutil.copytree(given / "colour", run)
    if content is not None:
        (run / name).write_bytes(content)
    elif (run / name).is_dir():
        shutil.rmtree(run / name)
        (run / name).mkdir()
    else:
        (run / name).unlink()
    before = {path: (run / path).stat().st_mtime_ns for path in files_below(run)}
    line = f"train tiny --data {given}/colour.npz --output-dir {run} --steps 3"
    whole = f"model must have whole files, got {run}"
    assert refusal(line, capsys).startswith(sentence.format(run=run, whole=whole))
    assert {path: (run / path).stat().st_mtime_ns for path in files_below(run)} == before


def test_file_in_the_way_is_refused(given, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    line = f"train tiny --data {given}/colour.npz --output-dir"
    assert refusal(f"{line} {taken}", capsys).startswith("output_dir must be a directory, got")
    assert refusal(f"{line} {taken}/run", capsys).startswith("output_dir must be in a directory")
    assert taken.read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 10k", "--steps must be an integer, got '10k'"),
        ("--learning-rate fast", "--learning-rate must be a number, got 'fast'"),
        ("--image-size 100000", "image_size must be at most 8192, got 100000"),
    ],
)
def test_numbers_that_make_no_sense_are_named(options, message, data, tmp_path, capsys):
    line = f"train tiny --data {data} --output-dir {tmp_path}/run {options}"
    assert refusal(line, capsys) == message


def test_what_may_not_have_been_meant_gets_one_line(tmp_path, capsys):
    write_folder(tmp_path / "photos", cat=3)
    line = f"train tiny --data {tmp_path}/photos/cat --output-dir {tmp_path}/run --batch-size 4"
    remixdit(f"{line} --steps 1 --warmup-steps 5")
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [
        "remixdit: warmup_steps 5 is longer than the run of 1 steps",
        f"remixdit: {tmp_path}/photos/cat has no folders of classes, so no classes are learned",
    ]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nothing", "--from must be a model directory, a run or owner/name, got {0}/nothing"),
        ("a.npz", "--from must be a model directory, a run or owner/name, got {0}/a.npz"),
        (
            "photos",
            "--from: checkpoint must be a model directory or a run with one, got {0}/photos",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train tiny", "study table2 --held-out {0}/a.npz"])
def test_a_start_that_is_no_model_is_named_by_its_flag(command, name, sentence, tmp_path, capsys):
    write_npz(tmp_path / "a.npz")
    write_folder(tmp_path / "photos", cat=1)
    line = f"{command} --data {{0}}/a.npz --output-dir {{0}}/run --from {{0}}/{name}"
    assert refusal(line.format(tmp_path), capsys) == sentence.format(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "train tiny --dta {0}/colour.npz --output-dir {0}/new",
            "Unrecognized options: --dta, {0}/colour.npz; perhaps --data; required: --data STR",
        ),
        (
            "plot {0}/colour/model",
            "run must have lines in metrics.jsonl, got {0}/colour/model; its run is {0}/colour",
        ),
        ("sample {0}/colour.npz --output {0}/a.png", "model must be a directory or a model of"),
        (
            "encode {0}/colour.npz --output {0}/new --image-size 16 --autoencoder vae",
            "autoencoder must be none, a directory, or owner/name on the hub, got vae",
        ),
        (
            "losses {0}/colour --data {0}/colour.npz --against {0}/nowhere",
            "{0}/nowhere: no such model, nor owner/name on the hub",
        ),
    ],
)
def test_a_careless_mistake_is_answered_by_what_was_meant(line, sentence, given, capsys):
    before = files_below(given)
    assert refusal(line.format(given), capsys).startswith(sentence.format(given))
    assert files_below(given) == before
