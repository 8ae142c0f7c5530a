"""What to run next: commands that can be copied as they stand.

They begin as the user's own did: `remixdit`, `./run` in a clone, or with this interpreter where
neither is on the path.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from remixdit.cli.terminal import is_first, say
from remixdit.figures.text import one_line

__all__ = ["remixdit_command", "say_next", "torchrun"]

RUN_SCRIPT = "REMIXDIT_COMMAND"  # set by ./run to its own path


def remixdit_command() -> str:
    """Return how the user calls remixdit, quoted for a shell."""
    script = os.environ.get(RUN_SCRIPT)
    if script:
        return shlex.quote(near(Path(script)))
    if shutil.which("remixdit"):
        return "remixdit"
    return f"{shlex.quote(sys.executable)} -m remixdit"


def torchrun(num_processes: int, num_machines: int = 1) -> str:
    """Return how the user starts remixdit on many processes of each machine."""
    program = "torchrun"
    if os.environ.get(RUN_SCRIPT) or not shutil.which(program):
        program = shlex.quote(near(Path(sys.executable).with_name(program)))
    machines = f" --nnodes {num_machines}" if num_machines > 1 else ""
    return f"{program}{machines} --nproc-per-node {num_processes} -m remixdit"


def near(program: Path) -> str:
    """Return the path of a program, a short one where it lies in the working directory."""
    return f"./{program.name}" if program.parent == Path.cwd() else str(program)


def say_next(text: str, *commands: Sequence[object], start: str = "") -> None:
    """Write what was done and what to run next, each command on a line of its own.

    Args:
        text: What was done.
        commands: Commands of remixdit with their options.
        start: Instead of how the user calls remixdit.
    """
    if not is_first():
        return
    say(f"{text}; next:")
    for words in commands:
        line = f"{start or remixdit_command()} {shlex.join(map(str, words))}"
        print(one_line(line), file=sys.stderr)
