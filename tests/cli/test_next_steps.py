"""What commands print to run next, and that it runs."""

import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from remixdit.cli.main import main
from remixdit.cli.next_steps import remixdit_command, say_next, torchrun
from remixdit.study.quickstart import QuickstartConfig, next_commands
from tests.command_line import remixdit, save_model, write_folder


def next_steps(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """Return the words of the commands that were printed last, without how remixdit is called."""
    lines = capsys.readouterr().err.splitlines()
    start = max(number for number, line in enumerate(lines) if line.endswith("; next:"))
    called = shlex.split(remixdit_command())
    steps = [shlex.split(line) for line in lines[start + 1 :]]
    assert steps
    assert all(words[: len(called)] == called for words in steps)
    return [words[len(called) :] for words in steps]


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_folder(tmp_path / "my photos", cat=8, dog=8)


def test_from_pictures_to_samples_by_printed_commands(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = "--steps 1 --batch-size 8 --depth 1 --hidden-size 8 --num-heads 1 --num-experts 4"
    assert main(["encode", str(photos), "--output", "my shards", "--image-size", "8"]) == 0
    (train,) = next_steps(capsys)
    assert train[:2] == ["train", "pixels-small"]
    assert main([*train, *tiny.split(), "--sample-every", "0"]) == 0
    sample, plot, demo = next_steps(capsys)
    assert demo == ["demo", "run"]
    assert main([*sample, "--num-images", "2", "--num-inference-steps", "1"]) == 0
    assert main(plot) == 0
    assert (tmp_path / "run" / "images.png").is_file()
    assert (tmp_path / "run" / "plots" / "loss.png").is_file()


@pytest.mark.parametrize("command", ["merge", "import"])
def test_a_model_that_was_made_is_sampled_by_the_printed_command(command, tmp_path, capsys):
    source = save_model(tmp_path / "source", 0, num_experts=5 if command == "merge" else 1)
    if command == "import":
        remixdit(f"export {source} --output {tmp_path}/exported")
        (source,) = (tmp_path / "exported").glob("*.safetensors")
    options = ["--num-heads", "2"] if command == "import" else []
    assert main([command, str(source), "--output", f"{tmp_path}/a model", *options]) == 0
    (sample,) = next_steps(capsys)
    assert main([*sample, "--num-images", "1", "--num-inference-steps", "1"]) == 0
    assert (tmp_path / "a model" / "images.png").is_file()


def test_paths_are_quoted_and_nothing_stands_before_a_command(capsys):
    say_next("wrote it", ("info", Path("my run")), ("plot", "a'b"))
    *_, first, second = capsys.readouterr().err.splitlines()
    assert first == f"{remixdit_command()} info 'my run'"
    assert shlex.split(second)[-1] == "a'b"


def test_commands_begin_as_the_users_own_did(tmp_path, monkeypatch):
    clone = tmp_path / "my clone"
    clone.mkdir()
    monkeypatch.setenv("REMIXDIT_COMMAND", str(clone / "run"))
    monkeypatch.chdir(clone)
    assert remixdit_command() == "./run"
    monkeypatch.chdir(tmp_path)
    assert shlex.split(remixdit_command()) == [str(clone / "run")]
    assert torchrun(8, 2).endswith("torchrun --nnodes 2 --nproc-per-node 8 -m remixdit")


def test_without_a_script_the_installed_command_or_the_interpreter_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("REMIXDIT_COMMAND", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert remixdit_command() == f"{shlex.quote(sys.executable)} -m remixdit"
    script = tmp_path / "remixdit"
    script.touch()
    script.chmod(stat.S_IRWXU)
    assert remixdit_command() == "remixdit"
    assert torchrun(2).endswith(
        f"{Path(sys.executable).parent}/torchrun --nproc-per-node 2 -m remixdit"
    )


def test_run_says_how_it_was_called(tmp_path):
    """The script of a clone, with another program in place of its Python."""
    clone = tmp_path / "clone"
    (clone / ".venv" / "bin").mkdir(parents=True)
    for name in ("run", "pyproject.toml", "constraints.txt"):
        shutil.copy(Path(__file__).parents[2] / name, clone)
    python = clone / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$REMIXDIT_COMMAND"\n')
    python.chmod(stat.S_IRWXU)
    wanted = subprocess.run(
        "cat pyproject.toml constraints.txt | cksum",
        shell=True, cwd=clone, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    stamp = clone / ".venv" / "installed-quickstart,data,evaluate"
    stamp.write_text(f"{clone} {wanted}\n")
    told = subprocess.run([clone / "run", "info"], capture_output=True, text=True, check=True)
    assert told.stdout == f"{clone}/run\n"


def test_the_quick_start_names_commands_that_exist(tmp_path):
    run = tmp_path / "a b"
    commands = next_commands(QuickstartConfig(output_dir=run))
    assert [words[0] for words in commands] == ["sample", "demo", "info", "plot", "train"]
    assert all(str(run) in shlex.split(shlex.join(words))[1] for words in commands[:4])
    assert os.fspath(run / "data" / "train") in commands[4]
