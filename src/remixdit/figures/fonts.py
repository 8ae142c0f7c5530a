"""A font that has the letters of a text, for pictures by Pillow and by matplotlib.

DejaVu, which matplotlib brings, has Latin, Greek, Cyrillic and more, but no Chinese, Japanese or
Korean letters: for those a font of this machine is looked for. Where there is none, boxes would be
drawn, and a class goes by its number instead.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.font_manager import FontEntry, fontManager
from matplotlib.ft2font import FT2Font

from remixdit.figures.text import one_line

__all__ = ["class_texts", "families", "font_file", "with_letters"]

DEJAVU = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")


def font_file(text: str) -> str:
    """Return DejaVu, or a font of this machine that has all letters of the text if one has."""
    found = _font_for(frozenset(text))
    return DEJAVU if found is None else found.fname


def families(text: str) -> list[str]:
    """Return the names of the fonts in which matplotlib looks for each letter of a text."""
    found = _font_for(frozenset(text))
    return ["DejaVu Sans", *([] if found is None or found.fname == DEJAVU else [found.name])]


def with_letters(text: str) -> str:
    """Return a text as one line, with the letters that no font has as escapes instead of boxes."""
    if _font_for(frozenset(text)) is not None:
        return one_line(text)
    known = _letters(DEJAVU)
    return one_line("".join(c if ord(c) in known else ascii(c)[1:-1] for c in text))


def class_texts(class_labels: Iterable[int], class_names: Sequence[str]) -> list[str]:
    """Return the name of each label, or "class 7" where no font has its letters.

    Args:
        class_labels: (n,) labels.
        class_names: Name of every class; empty for none, which makes empty texts.
    """
    if not class_names:
        return []
    texts = [f"class {n}" if _font_for(frozenset(name)) is None else one_line(name)
             for n, name in enumerate(class_names)]  # fmt: skip
    return [texts[label] for label in class_labels]


@cache
def _font_for(letters: frozenset[str]) -> FontEntry | None:
    """Return a font that has all of some letters, upright and regular where possible."""
    codes = {ord(letter) for letter in letters if not letter.isspace()}
    ordered = sorted(
        fontManager.ttflist,
        key=lambda f: (f.fname != DEJAVU, f.style != "normal", str(f.weight) != "400", f.fname),
    )
    # Pillow cannot scale emoji of fixed size; the font of last resort draws only boxes.
    usable = (f for f in ordered if not re.search("emoji|lastresort", f.fname.lower()))
    return next((font for font in usable if codes <= _letters(font.fname)), None)


@cache
def _letters(path: str) -> frozenset[int]:
    return frozenset(FT2Font(path).get_charmap())
