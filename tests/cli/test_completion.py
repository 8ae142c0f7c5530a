"""What a shell offers after the Tab key, asked of a real bash."""

import shutil
import subprocess

import pytest

from remixdit.cli.completion import SECOND_WORDS
from remixdit.cli.main import COMMANDS
from tests.command_line import refusal, remixdit

# In a shell of its own, as after a Tab at the end of the line.
ASK = """
source "$1"
COMP_WORDS=("${@:2}")
COMP_CWORD=$(($# - 2))
_remixdit
echo "${COMPREPLY[@]}"
complete -p remixdit >&2
"""


def offered(script: str, *words: str) -> set[str]:
    """Return what bash offers in the place of the last word."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK, "bash", script, "remixdit", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "-o default" in done.stderr  # files, where no word fits
    return set(done.stdout.split())


def test_bash_completes_commands_presets_and_flags(tmp_path, capsys):
    remixdit("completion bash")
    path = tmp_path / "remixdit"
    path.write_text(capsys.readouterr().out)
    assert offered(str(path), "") == set(COMMANDS)
    assert offered(str(path), "qu") == {"quickstart"}
    assert offered(str(path), "train", "xl") == {"xl2"}
    assert "--num-bases" not in offered(str(path), "train", "xl")
    assert offered(str(path), "train", "xl2", "--num-b") == {"--num-bases"}
    assert offered(str(path), "sample", "run", "--guidance-s") == {"--guidance-scale"}
    assert {"--ema", "--no-ema"} <= offered(str(path), "sample", "run", "-")
    assert offered(str(path), "bench", "d") == {"data"}
    assert offered(str(path), "sample", "ru") == set()


def test_zsh_runs_the_script_of_bash_and_fish_has_its_own(capsys):
    scripts = {}
    for shell in SECOND_WORDS["completion"]:
        remixdit(f"completion {shell}")
        scripts[shell] = capsys.readouterr().out
    first, *rest = scripts["zsh"].splitlines(keepends=True)
    assert first == "autoload -U +X bashcompinit && bashcompinit\n"
    assert "".join(rest) == scripts["bash"]
    lines = scripts["fish"].splitlines()
    assert all(line.startswith("complete -c remixdit -n ") for line in lines)
    assert "complete -c remixdit -n '__fish_seen_subcommand_from train' -l num-bases" in lines


def test_other_shells_are_refused(capsys):
    assert refusal("completion tcsh", capsys) == (
        "completion must be of bash, zsh or fish, got 'tcsh'"
    )
