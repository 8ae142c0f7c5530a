"""Words of the command line => a frozen dataclass, by tyro, with errors of one line."""

import contextlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

import tyro

__all__ = ["base_config", "parse", "refuse_moved"]

Config = TypeVar("Config")

MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.PositionalMetavarFromFieldName)

UNRECOGNIZED = "Unrecognized options:"  # tyro's words for flags that do not exist


def parse(
    kind: type[Config], args: Sequence[str], command: str, default: Config | None = None
) -> Config:
    """Return the dataclass that the words describe.

    Args:
        kind: Its fields are the flags, those of nested dataclasses too; the text under each is
            its help.
        args: What follows the command.
        command: Its name, for the help.
        default: Instead of the defaults of `kind`.

    Raises:
        ValueError: A word is not understood, missing, or names a value out of range.
        SystemExit: help was asked for, and has been printed.
    """
    printed = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(printed), wide_errors(args):
            return tyro.cli(
                kind,
                prog=f"remixdit {command}",
                args=list(args),
                config=MARKERS,
                **given,
            )
    except SystemExit as end:
        if not end.code:
            raise
        flags = flags_of(kind, **given) if UNRECOGNIZED in printed.getvalue() else []
        raise ValueError(one_line(printed.getvalue(), command, flags)) from None


def base_config(arguments: object, kind: type[Config]) -> Config:
    """Return the library's part of the arguments of a command, which inherits from it."""
    return kind(**{field.name: getattr(arguments, field.name) for field in fields(kind)})  # type: ignore[arg-type]


def refuse_moved(args: Sequence[str], flags: Iterable[str], command: str) -> None:
    """Name the command that flags have moved to, where one of them is among the words."""
    for word in args:
        flag = word.split("=")[0].replace("_", "-")
        if flag in flags:
            raise ValueError(f"{flag} has moved to another command: remixdit {command}")


@contextlib.contextmanager
def wide_errors(args: Sequence[str]) -> Iterator[None]:
    """Let tyro write each error on one line, but help as wide as the terminal is."""
    if {"-h", "--help"} & set(args):
        yield
        return
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def one_line(box: str, command: str, flags: Sequence[str]) -> str:
    """Return the error inside of tyro's box: a title, the error and hints between rules.

    Args:
        box: Output of tyro.
        command: Name of the command.
        flags: Flags of the command, one of which a typo may mean.
    """
    sections: list[list[str]] = [[]]
    for line in (line.strip("│").rstrip() for line in box.splitlines()):
        if set(line.strip()) <= {"-", "─"} or line.startswith(("╭", "╰")):
            sections.append([])
        else:
            sections[-1].append(line)
    error, hints = ([part for part in sections[1:] if part] + [[], []])[:2]
    more = f" (remixdit {command} --help says more)"
    if error and "Missing from" in error[0]:  # then flags, and further to the right their help
        missing = [line.strip() for line in error if indent(line) == indent(error[1])]
        required = f"required: {', '.join(missing)}"
        if not (hints and hints[0].strip().startswith(UNRECOGNIZED)):
            return required + more
        return f"{unrecognized([line.strip() for line in hints[1:]], flags)}; {required}"
    text = " ".join(line.strip() for line in error)
    if not text.startswith(UNRECOGNIZED):
        text = re.sub(r"^Error parsing (?:(?!-)\S+: )?", "", text)
        text = re.sub(
            r": invalid literal for int\(\) .*: (?='.*'$)", " must be an integer, got ", text
        )
        return re.sub(r": could not convert string to float: ", " must be a number, got ", text)
    found = unrecognized(text.removeprefix(UNRECOGNIZED).strip().split(", "), flags)
    return found if "; perhaps " in found else found + more


def unrecognized(words: Sequence[str], flags: Sequence[str]) -> str:
    """Name words that are not understood, and the flag that the first may mean."""
    meant = get_close_matches(words[0], flags, 1)
    return f"{UNRECOGNIZED} {', '.join(words)}" + "".join(f"; perhaps {flag}" for flag in meant)


def flags_of(kind: type, **given: Any) -> list[str]:
    """Return the flags that the help of a command names."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], config=MARKERS, **given)
    return re.findall(r"--[a-z][\w-]*", printed.getvalue())


def indent(line: str) -> int:
    """Return how many spaces a line begins with."""
    return len(line) - len(line.lstrip())
