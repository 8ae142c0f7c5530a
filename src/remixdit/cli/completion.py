"""`remixdit completion bash|zsh|fish`: a script that lets a shell complete commands and flags.

The script holds all words, so the Tab key does not wait for torch.
"""

import contextlib
import io
import re
from collections.abc import Sequence
from importlib import import_module

from remixdit.cli.bench import MEASURES
from remixdit.cli.main import COMMANDS
from remixdit.study.variants import STUDIES
from remixdit.training.presets import PRESETS

__all__ = ["run"]

USAGE = """\
usage: remixdit completion bash|zsh|fish

  bash  remixdit completion bash > ~/.local/share/bash-completion/completions/remixdit
  zsh   remixdit completion zsh > ~/.remixdit.zsh && echo 'source ~/.remixdit.zsh' >> ~/.zshrc
  fish  remixdit completion fish > ~/.config/fish/completions/remixdit.fish
"""

# What follows a command before its flags.
SECOND_WORDS = {
    "bench": (*MEASURES, "data"),
    "completion": ("bash", "zsh", "fish"),
    "data": ("check",),
    "study": tuple(STUDIES),
    "train": tuple(PRESETS),
}

# A line of tyro's help that begins with flags, behind the bar of a box or a blank.
FLAG_LINE = re.compile(r"^. (?:-h, )?(--[\w-]+(?:, --[\w-]+)*)", re.MULTILINE)

BASH = """\
_remixdit() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" words=""
    if [[ $COMP_CWORD == 1 ]]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _remixdit remixdit
"""

CASE = """\
            {command})
                words="{flags}"
                [[ $COMP_CWORD == 2 ]] && words+=" {second}"
                ;;"""


def run(args: Sequence[str]) -> None:
    """Print the script of a shell."""
    shell = args[0] if args else ""
    if {"-h", "--help"} & set(args):
        print(USAGE, end="")
        return
    if shell not in SECOND_WORDS["completion"] or len(args) > 1:
        raise ValueError(f"completion must be of bash, zsh or fish, got {' '.join(args)!r}")
    words = {command: flags_of_command(command) for command in COMMANDS}
    if shell == "fish":
        print(fish_script(words), end="")
        return
    print("autoload -U +X bashcompinit && bashcompinit\n" * (shell == "zsh"), end="")
    print(bash_script(words), end="")


def flags_of_command(command: str) -> list[str]:
    """Return the flags that the help of a command lists."""
    module = import_module(f"remixdit.cli.{COMMANDS[command][0]}")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        module.run([*SECOND_WORDS.get(command, ())[:1], "--help"])
    found = FLAG_LINE.findall(printed.getvalue())
    return [flag for flags in found for flag in flags.split(", ")]


def bash_script(words: dict[str, list[str]]) -> str:
    """Return a function of bash, which zsh runs too; files are completed where no word fits."""
    cases = (
        CASE.format(
            command=command, flags=" ".join(flags), second=" ".join(SECOND_WORDS.get(command, ()))
        )
        for command, flags in words.items()
    )
    return BASH.format(commands=" ".join(COMMANDS), cases="\n".join(cases))


def fish_script(words: dict[str, list[str]]) -> str:
    """Return one `complete` of fish for the commands, and two for each command."""
    lines = [f"complete -c remixdit -n __fish_use_subcommand -f -a '{' '.join(COMMANDS)}'"]
    for command, flags in words.items():
        given = f"__fish_seen_subcommand_from {command}"
        if second := " ".join(SECOND_WORDS.get(command, ())):
            first = f"{given}; and test (count (commandline -opc)) -eq 2"
            lines.append(f"complete -c remixdit -n '{first}' -a '{second}'")
        lines += [f"complete -c remixdit -n '{given}' -l {flag[2:]}" for flag in flags]
    return "\n".join(lines) + "\n"
