"""The commands as a user calls them."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from remixdit import __version__
from remixdit.cli.main import COMMANDS, main
from remixdit.cli.next_steps import remixdit_command
from tests.command_line import (
    SIDE,
    files_below,
    refusal,
    remixdit,
    write_folder,
    write_npz,
)
from tests.processes import launch


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run on pictures of cats, dogs and elks."""
    root = tmp_path_factory.mktemp("cli")
    data = write_folder(root / "photos", cat=8, dog=8, elk=8)
    remixdit(f"train tiny --data {data} --output-dir {root}/run")
    return root / "run"


def in_process_of_its_own(line: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "remixdit", *line.split()]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def picture(path: Path) -> np.ndarray:
    """Return a picture as (H, W, C)."""
    with Image.open(path) as image:
        return np.asarray(image)


def drawn(path: Path) -> tuple[np.ndarray, list[int]]:
    """Return images and labels of an npz."""
    with np.load(path) as arrays:
        return arrays["arr_0"], arrays["arr_1"].tolist()


# --- the command line as a whole


def test_help_and_version_do_not_wait_for_torch():
    code = (
        "import sys; from remixdit.cli.main import main; main(['--help']); "
        "print('torch' in sys.modules)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.splitlines()[-1] == "False"
    assert all(f"\n  {command} " in printed.stdout for command in COMMANDS)


def test_version_is_printed(capsys):
    remixdit("--version")
    assert capsys.readouterr().out == f"remixdit {__version__}\n"


def test_wrong_request_exits_with_2_and_one_line_on_stderr(tmp_path):
    done = in_process_of_its_own(f"train tinny --data x --output-dir {tmp_path}/run")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"remixdit: error: preset must be one of .*, got 'tinny'.*\n", done.stderr)


def test_run_without_a_terminal_says_what_is_next_and_nothing_else(tmp_path):
    data = write_npz(tmp_path / "pictures.npz")
    done = in_process_of_its_own(f"train tiny --data {data} --output-dir {tmp_path}/run")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == (
        f"remixdit: trained 20 steps; the model is {tmp_path}/run/model; next:\n"
        f"{remixdit_command()} sample {tmp_path}/run --output {tmp_path}/run/images.png\n"
        f"{remixdit_command()} plot {tmp_path}/run\n"
        f"{remixdit_command()} demo {tmp_path}/run\n"
    )


def test_long_run_without_a_terminal_says_a_line_a_minute(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("remixdit.cli.terminal.LINE_SECONDS", 0)
    data = write_npz(tmp_path / "pictures.npz")
    remixdit(f"train tiny --data {data} --output-dir {tmp_path}/run --experts-per-step 2")
    last = capsys.readouterr().err.splitlines()[-5]  # then what was done, and three commands
    number = r"[\d.,]+"
    assert re.fullmatch(
        rf"remixdit: train 20/20, loss {number}, {number} images/s, experts \d \d, "
        rf"(saved step \d+, )?0:00:00 left",
        last,
    )


def test_a_narrow_terminal_shows_loss_speed_and_time_left_in_every_frame(tmp_path):
    pty = pytest.importorskip("pty")
    data = write_npz(tmp_path / "pictures.npz")
    line = f"-m remixdit train tiny --data {data} --output-dir {tmp_path}/run"
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen([sys.executable, *line.split()], stderr=theirs, env=environment)
    os.close(theirs)
    shown = ""
    with contextlib.suppress(OSError):  # Linux's way to say that the terminal has no other end
        while part := os.read(ours, 4096):
            shown += part.decode(errors="replace")
    os.close(ours)
    assert process.wait() == 0
    frames = re.findall(r"train \S+ +(\d+)/20 ([^\r\n]*)", re.sub(r"\x1b\[[\d;?]*\w", "", shown))
    stepped = [facts for done, facts in frames if int(done) > 1]
    assert frames[-1][0] == "20"
    for facts in stepped:
        assert re.match(r"loss \d\.\d{4}, [\d.,]+ images/s, experts .* \d:\d\d:\d\d *$", facts)


def test_unknown_command_is_named_with_the_one_meant(capsys):
    assert refusal("trian tiny", capsys) == "no command 'trian': perhaps train"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        remixdit(f"{command} --help")
    printed = capsys.readouterr()
    assert printed.out.startswith("usage: remixdit ")
    assert max(map(len, printed.out.splitlines())) < 200
    assert printed.err == ""


def test_help_of_a_preset_shows_its_values(capsys):
    remixdit("train tiny --help")
    printed = " ".join(capsys.readouterr().out.split())
    assert "--from" in printed
    assert "--num-experts" in printed
    assert "(default: 20)" in printed


def test_a_bug_is_not_hidden(monkeypatch):
    monkeypatch.setitem(COMMANDS, "info", ("no_such_module", ""))
    with pytest.raises(ModuleNotFoundError):
        main(["info"])


def test_too_little_memory_ends_in_one_line(run, monkeypatch, capsys):
    def describe(*_args: object, **_options: object) -> None:
        torch.empty(10**16, dtype=torch.uint8)

    monkeypatch.setattr("remixdit.cli.info.describe", describe)
    assert "allocate memory" in refusal(f"info {run}", capsys, code=1)


# --- train


def test_flags_reach_every_part_of_the_configuration(tmp_path):
    data = write_npz(tmp_path / "pictures.npz")
    remixdit(
        f"train tiny --data {data} --output-dir {tmp_path}/run --steps 1 --seed 3 --mirror "
        "--hidden-size 16 --num-bases 3 --experts-per-step 2 --learning-rate 1e-5 --betas 0.8 0.9 "
        "--log-every 2 --no-tensorboard"
    )
    stated = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stated["seed"] == 3
    assert stated["objective"]["mirror"] is True
    assert stated["network"]["hidden_size"] == 16
    assert stated["mixture"]["num_bases"] == 3
    assert stated["mixture"]["experts_per_step"] == 2
    assert stated["optimizer"]["betas"] == [0.8, 0.9]
    assert stated["output"]["log_every"] == 2


def test_plain_model_is_remixed(tmp_path, capsys):
    data = write_npz(tmp_path / "pictures.npz")
    line = f"train tiny --data {data} --steps 2 --output-dir {tmp_path}"
    remixdit(f"{line}/plain --num-bases 1 --num-experts 1")
    remixdit(f"{line}/remixed --from {tmp_path}/plain --num-bases 3 --num-experts 7")
    remixdit(f"info {tmp_path}/remixed --json")
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_bases"], facts["num_experts"]) == (3, 7)


# --- sample


def sample(run: Path, output: str, options: str = "") -> str:
    """Return the command that draws six pictures."""
    return f"sample {run} --num-images 6 --num-inference-steps 3 --output {output} {options}"


def test_npz_holds_images_and_labels(run, tmp_path):
    remixdit(sample(run, f"{tmp_path}/out.npz", "--class-labels 1,2"))
    images, labels = drawn(tmp_path / "out.npz")
    assert images.shape == (6, SIDE, SIDE, 3)
    assert images.dtype == np.uint8
    assert labels == [1, 2, 1, 2, 1, 2]
    assert files_below(tmp_path) == {"out.npz"}


def test_folder_and_npz_hold_the_same_images(run, tmp_path):
    remixdit(sample(run, f"{tmp_path}/out.npz"))
    remixdit(sample(run, f"{tmp_path}/out/", "--batch-size 4"))
    files = [picture(tmp_path / "out" / f"{i:06}.png") for i in range(6)]
    np.testing.assert_array_equal(drawn(tmp_path / "out.npz")[0], files)
    about = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert about["class_labels"] == [0, 1, 2, 0, 1, 2]
    assert about["sampling"]["num_inference_steps"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("way", ["", "--precompute"])
def test_a_compiled_network_draws_the_same_images(way, run, tmp_path):
    remixdit(sample(run, f"{tmp_path}/eager.npz"))
    remixdit(sample(run, f"{tmp_path}/compiled.npz", f"--compile {way}"))
    eager, compiled = (drawn(tmp_path / f"{name}.npz")[0] for name in ("eager", "compiled"))
    np.testing.assert_allclose(compiled.astype(int), eager.astype(int), atol=1)


@pytest.mark.slow
def test_two_processes_draw_the_same_images(run, tmp_path, capsys):
    remixdit(sample(run, f"{tmp_path}/one/", "--batch-size 2"))
    launch(sample(run, f"{tmp_path}/two/", "--batch-size 2"))
    assert files_below(tmp_path / "one") == files_below(tmp_path / "two")
    for i in range(6):
        one, two = (picture(tmp_path / name / f"{i:06}.png") for name in ("one", "two"))
        np.testing.assert_array_equal(one, two)


def test_classes_may_be_named(run, tmp_path):
    for name, labels in (("a", "dog,elk"), ("b", "1,2"), ("c", "2,1")):
        remixdit(sample(run, f"{tmp_path}/{name}.npz", f"--class-labels {labels}"))
    named, numbered, turned = (drawn(tmp_path / f"{name}.npz") for name in "abc")
    np.testing.assert_array_equal(named[0], numbered[0])
    assert named[1] == numbered[1] != turned[1]


def test_grid_is_a_picture_with_a_column_for_each_class(run, tmp_path):
    remixdit(sample(run, f"{tmp_path}/grid.png", "--class-labels cat,elk"))
    grid = picture(tmp_path / "grid.png")
    inside = grid[60:].min(2) < 255  # below the title
    assert 3 * 64 < len(inside) < 4 * 64 + 60
    assert 2 * 64 <= np.flatnonzero(inside.any(0)).max() < 3 * 64  # 2 columns, 3 rows


def test_strips_stand_beside_the_samples_and_are_replaced_on_request_only(run, tmp_path, capsys):
    line = sample(run, f"{tmp_path}/a.npz", f"--strips {tmp_path}/strips.png")
    remixdit(line)
    height, width, _ = picture(tmp_path / "strips.png").shape
    assert width < height + 100  # 4 images at 3 moments
    (tmp_path / "a.npz").unlink()
    assert refusal(line, capsys).startswith("output must not exist (--overwrite replaces it)")
    assert files_below(tmp_path) == {"strips.png"}
    wrong = sample(run, f"{tmp_path}/a.npz", "--strips strips.pdf")
    assert refusal(wrong, capsys) == "strips must be a .png, got strips.pdf"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--guidance-scale 0.9", "guidance_scale must be at least 1, got 0.9"),
        ("--class-labels 3", "class_labels must be in [0, 3), got 3"),
        ("--class-labels -1", "class_labels must be in [0, 3), got -1"),
        (
            "--class-labels cow",
            "class_labels must be numbers or names of the model's 3 classes (such as "
            '["cat", "dog", "elk"]), got \'cow\'',
        ),
        ("--scheduler euler", "scheduler must be one of ddpm, ddim, dpm++ for epsilon, got euler"),
        (
            "--thresholding clip",
            "thresholding must be one of none, static, dynamic, got 'clip'",
        ),
        ("--num-images 0", "num_images must be at least 1, got 0"),
        ("--num-inference-steps 1001", "num_inference_steps must be at most 1000, got 1001"),
        ("--precision fp16", "precision must be fp32 or bf16, got 'fp16'"),
    ],
)
def test_wrong_sampling_is_refused(options, sentence, run, tmp_path, capsys):
    assert refusal(sample(run, f"{tmp_path}/out.png", options), capsys) == sentence
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize("name", ["out.png", "out.npz", "out/"])
def test_samples_are_replaced_only_on_request(name, run, tmp_path, capsys):
    output = f"{tmp_path}/{name}"
    remixdit(sample(run, output, "--seed 1"))
    before = {path: (tmp_path / path).stat().st_mtime_ns for path in files_below(tmp_path)}
    assert "--overwrite replaces it" in refusal(sample(run, output), capsys)
    assert {path: (tmp_path / path).stat().st_mtime_ns for path in before} == before
    remixdit(sample(run, output, "--overwrite"))
    assert files_below(tmp_path) == set(before)


def test_overwrite_spares_what_is_no_sample(run, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    message = refusal(sample(run, f"{tmp_path}", "--overwrite"), capsys)
    assert message == f"output must hold nothing but samples, got {tmp_path}/notes.txt"
    assert refusal(sample(run, f"{tmp_path}/notes.txt"), capsys).startswith("output must be a .png")
    assert refusal(sample(run, f"{tmp_path}/notes.txt/out.png"), capsys).startswith(
        "output must be in a directory"
    )


def test_full_disk_leaves_no_sample(run, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        message = refusal(sample(run, f"{tmp_path}/out.npz"), capsys, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert message == f"{tmp_path}/out.npz: File too large"
    assert files_below(tmp_path) == set()


def test_directory_without_a_model_is_refused(tmp_path, capsys):
    message = refusal(sample(tmp_path, f"{tmp_path}/out.png"), capsys)
    assert message.startswith("checkpoint must be a model directory or a run with one")


# --- looking at a run


def test_plot_draws_what_the_run_has(run, tmp_path):
    remixdit(f"plot {run} --output {tmp_path}/plots")
    names = {"coefficients", "gradients", "loss", "loss-by-interval"}
    gif = "coefficients.gif"
    assert files_below(tmp_path / "plots") == {gif, *(f"{name}.png" for name in names)}
    with Image.open(tmp_path / "plots" / gif) as animation:
        assert animation.n_frames == 5  # of the start, and a line every 5 of 20 steps
    remixdit(f"plot {run} --output {tmp_path}/print --format svg")
    assert files_below(tmp_path / "print") == {gif, *(f"{name}.svg" for name in names)}


def test_plot_draws_a_plain_run_with_strata(tmp_path):
    data = write_npz(tmp_path / "pictures.npz")
    options = "--num-bases 1 --num-experts 1 --timestep-strata 4"
    remixdit(f"train tiny --data {data} --output-dir {tmp_path}/run {options}")
    remixdit(f"plot {tmp_path}/run")
    assert files_below(tmp_path / "run" / "plots") == {"loss.png", "loss-by-interval.png"}
    from remixdit.evaluation.run_figures import logged_boundaries
    from remixdit.model.describe import describe

    boundaries = logged_boundaries(tmp_path / "run", describe(tmp_path / "run"))
    assert boundaries == [0, 49, 154, 347, 1000]  # those that timesteps were spread over


def test_plot_of_no_run_is_refused(tmp_path, capsys):
    message = refusal(f"plot {tmp_path}", capsys)
    assert message == f"run must have lines in metrics.jsonl, got {tmp_path}"
    assert files_below(tmp_path) == set()


def test_info_is_for_people_and_for_programs(run, capsys):
    remixdit(f"info {run}")
    assert "K = 2 bases, N = 4 experts, softmax" in capsys.readouterr().out
    remixdit(f"info {run}/checkpoints/step-00000010 --json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["step"] == 10
    assert facts["boundaries"] == [0, 49, 154, 347, 1000]  # of equal parts of the gradient
    assert facts["class_names"] == ["cat", "dog", "elk"]
    np.testing.assert_allclose(np.sum(facts["coefficients"], axis=1), 1, rtol=1e-6)


# --- data


def test_encoded_data_are_checked_and_trained_on(tmp_path, capsys):
    data = write_npz(tmp_path / "pictures.npz", count=40)
    shards = tmp_path / "shards"
    remixdit(f"encode {data} --output {shards} --image-size 8")
    remixdit(f"data check {shards} --output {tmp_path}/sheet.png")
    assert "40 images of pictures.npz" in capsys.readouterr().out
    assert picture(tmp_path / "sheet.png").shape[1] > 64
    remixdit(f"train tiny --data {shards} --output-dir {tmp_path}/run --steps 1")
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize("name", ["sheet.jpg", "nowhere/sheet.png"])
def test_contact_sheet_that_cannot_be_written_is_refused_first(name, tmp_path, capsys):
    message = refusal(f"data check {tmp_path} --output {tmp_path}/{name}", capsys)
    assert message == (f"output must be a .png in a directory that exists, got {tmp_path}/{name}")


def test_flipped_bit_is_found(tmp_path, capsys):
    data, shards = write_npz(tmp_path / "pictures.npz"), tmp_path / "shards"
    remixdit(f"encode {data} --output {shards} --image-size 16")
    shard = shards / "latents-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert main(["data", "check", str(shards)]) == 2
    printed = capsys.readouterr()
    assert "latents-00000.npy" in printed.out
    assert printed.err == f"remixdit: error: {shards} has 1 problems\n"


# --- interchange


def test_expert_goes_out_and_comes_back(run, tmp_path, capsys):
    remixdit(f"export {run} --format experts --output {tmp_path}/experts")
    remixdit(
        f"import {tmp_path}/experts/expert-003.safetensors --output {tmp_path}/plain "
        "--license mit --num-heads 2"
    )
    capsys.readouterr()
    remixdit(f"info {tmp_path}/plain --json")
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_bases"], facts["num_experts"], facts["license"]) == (1, 1, "mit")
