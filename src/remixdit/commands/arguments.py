"""Words of the command line => a frozen dataclass, by tyro, with errors of one line."""

import contextlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import tyro

__all__ = ["base_config", "parse"]

Config = TypeVar("Config")


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
        ValueError: a word is not understood, missing, or names a value out of range.
        SystemExit: help was asked for, and has been printed.
    """
    printed = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(printed), wide_terminal():
            return tyro.cli(
                kind,
                prog=f"remixdit {command}",
                args=list(args),
                config=(tyro.conf.OmitArgPrefixes,),
                **given,
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(
            f"{one_line(printed.getvalue())} (remixdit {command} --help says more)"
        ) from None


def base_config(arguments: object, kind: type[Config]) -> Config:
    """Return the library's part of the arguments of a command, which inherits from it."""
    return kind(**{field.name: getattr(arguments, field.name) for field in fields(kind)})  # type: ignore[arg-type]


@contextlib.contextmanager
def wide_terminal() -> Any:
    """Let tyro write each error on one line."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def one_line(box: str) -> str:
    """Return the error inside of tyro's box, up to its first rule."""
    inside = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    rule = next((i for i, line in enumerate(inside) if line.startswith("──")), len(inside))
    lines = inside[:rule]
    if lines and lines[0].startswith("Missing from"):
        return "required: " + ", ".join(line for line in lines if line.startswith("--"))
    meant = [line.split()[0] for line in inside[rule:] if line.startswith("--")]
    text = re.sub(r"^Error parsing (?!-)\S+: ", "", " ".join(lines))
    return f"{text}; perhaps {meant[0]}" if "Unrecognized" in text and meant else text
