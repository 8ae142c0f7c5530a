"""The command line: find the command, run it, turn what went wrong into one line.

Exit codes: 0 done; 1 the machine failed (a full disk, too little memory); 2 the request makes no
sense; 75 training was stopped and saved; 130 interrupted. Results go to stdout, all else to stderr.
"""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from remixdit import __version__
from remixdit.cli.memory import keep_memory
from remixdit.figures.text import one_line

__all__ = ["main"]

# name: (module of remixdit.cli, what it does)
COMMANDS = {
    "quickstart": ("quickstart", "the workflow on real digits, on a CPU in minutes, with a report"),
    "encode": ("encode", "images -> shards of pixels or latents; resumable"),
    "data": ("data", "check DIR: verify shards, show a contact sheet and the classes"),
    "plan": ("plan", "which K, micro-batch and sharding fit a GPU, with memory and hours"),
    "train": ("train", "train or fine-tune; the same command again resumes"),
    "sample": ("sample", "draw images: a grid, an npz or files"),
    "demo": ("demo", "a page in the browser: images, experts and coefficients at work"),
    "evaluate": ("evaluate", "score a model or images against real ones"),
    "losses": ("losses", "experts against intervals on held-out images: losses, matrix, bits"),
    "plot": ("plot", "figures of a run: losses, coefficients, gradients"),
    "import": ("importing", "a published DiT or Remix-DiT checkpoint -> a model directory"),
    "export": ("exporting", "a model -> plain DiTs, or diffusers"),
    "push": ("pushing", "a model, with its card -> the Hugging Face hub"),
    "merge": ("merging", "N experts -> one plain network: their mean, or the best mix for --data"),
    "study": ("study", "variants at equal budget over seeds: tables, figures, a report"),
    "bench": ("bench", "train, sample or data: times on this machine, beside plain and naive"),
    "info": ("info", "sizes, intervals, coefficients and cost of a model"),
    "completion": ("completion", "bash, zsh or fish: a script that completes commands and flags"),
}

TRAINING = {"quickstart", "train", "study", "bench"}  # commands that repeat the same step

# Of safetensors, which is not imported just to be named: what its files meet on a full disk.
MACHINE_ERRORS = ("SafetensorError",)

LESS_MEMORY = (
    "too little memory: --micro-batch-size, --batch-size, --recompute and --precision bf16 need "
    "less, where a command has them ({})"
)
NO_MEMORY = "can't allocate memory"  # in a RuntimeError, which is what torch raises on a CPU

PATIENCE_SECONDS = 3  # of all processes but the first, before they speak of errors

HELP = """\
usage: remixdit COMMAND ...

{commands}

remixdit COMMAND --help    lists the options of a command
remixdit --version         prints the version
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    args = own_arguments() if args is None else list(args)
    log_to_stderr()
    # It deprecates what diffusers does, which is not news for the user.
    warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
    try:
        return run(args)
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":  # all processes are interrupted at once
            complain(str(interrupt) or "interrupted")
        return 130
    except ValueError as error:
        return failed(error, 2)
    except (OSError, MemoryError, ArithmeticError) as error:
        return failed(error, 1)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or NO_MEMORY in str(error):
            return failed(MemoryError(LESS_MEMORY.format(" ".join(str(error).split())[:200])), 1)
        if type(error).__name__ not in MACHINE_ERRORS:
            raise
        return failed(error, 1)


def own_arguments() -> list[str]:
    """Return the arguments of this process, which is ours, and so is how it keeps its memory."""
    if set(sys.argv[1:2]) & TRAINING:
        keep_memory()
    return sys.argv[1:]


def run(args: Sequence[str]) -> int:
    """Run one command."""
    name, *rest = args or ["--help"]
    if name in ("-h", "--help"):
        lines = (f"  {command:10} {purpose}" for command, (_, purpose) in COMMANDS.items())
        print(HELP.format(commands="\n".join(lines)), end="")
        return 0
    if name == "--version":
        print(f"remixdit {__version__}")
        return 0
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, 1)
        meant = f"perhaps {close[0]}" if close else f"there are {', '.join(COMMANDS)}"
        raise ValueError(f"no command {name!r}: {meant}")
    module = import_module(f"remixdit.cli.{COMMANDS[name][0]}")
    try:
        module.run(rest)
    except SystemExit as end:  # after --help
        return int(end.code or 0)
    return 0


def log_to_stderr() -> None:
    """Show the library's warnings, a line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("remixdit: %(message)s"))
    logging.getLogger("remixdit").handlers = [handler]


class OneLine(logging.Formatter):
    """Warnings hold names of others: each is one printable line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return one_line(super().format(record))


def failed(error: Exception, code: int) -> int:
    """Say in one line what went wrong; return the exit code."""
    if os.environ.get("REMIXDIT_TRACEBACK"):
        traceback.print_exception(error)
    name = type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'cannot read or write'}: {error.strerror}"
    else:
        text = " ".join(str(error).split()) or name
    complain(f"error: {text}", is_own=isinstance(error, OSError))
    return code


def complain(text: str, is_own: bool = False) -> None:
    """Write one line to stderr.

    What is wrong with a request is wrong for every process, and the first says it. Another waits:
    it speaks if torchrun has not ended it by then, for what went wrong is its own.

    Args:
        text: What went wrong.
        is_own: It is known to be this process's own, such as a disk that cannot be read.
    """
    rank = os.environ.get("RANK", "0")
    who = "remixdit" if rank == "0" else f"remixdit, process {rank}"
    time.sleep(0 if rank == "0" or is_own else PATIENCE_SECONDS)
    print(f"{who}: {one_line(text)}", file=sys.stderr)
