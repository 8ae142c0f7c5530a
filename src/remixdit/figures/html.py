"""Figures and tables -> one HTML file that needs nothing else.

Pictures are inlined, nothing is fetched and no script runs: the file can be mailed, archived and
printed. It is written as XHTML-compatible HTML5, so any XML parser reads it too.
"""

import os
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure
from PIL import Image

from remixdit.figures.text import printable
from remixdit.files import write_file

__all__ = ["Block", "Commands", "Heading", "Picture", "Table", "Text", "write_report"]

# Nothing is loaded from anywhere, whatever a text may hold.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --line: #8884; --shade: #8881; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem;
  color: CanvasText; background: Canvas; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.2; margin: 2.2rem 0 0.8rem; }
h1 { margin-top: 0; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; background: #fff; }
figcaption, caption { font-size: 0.9rem; opacity: 0.8; text-align: left; margin: 0.3rem 0; }
.wide { overflow-x: auto; }  /* on a phone this box scrolls, the page does not */
.wide img { min-width: min(var(--width), 40rem); }  /* the letters in it stay legible */
caption { max-width: min(60rem, 92vw); }  /* of the page, not of a table that is wider */
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.93rem; }
th, td { padding: 0.35rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; }
th { border-bottom-width: 2px; }
.number { text-align: right; }
pre { background: var(--shade); padding: 0.8rem 1rem; border-radius: 4px; overflow-x: auto; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; }
  table { font-size: 0.88rem; }
  th, td { padding: 0.3rem 0.5rem; }
}
@media print {
  :root { color-scheme: light; }
  body { margin: 0; max-width: none; font-size: 11pt; }
  figure, table, pre { break-inside: avoid; }
  h1, h2, h3 { break-after: avoid; }
  pre { white-space: pre-wrap; }
  .wide img { min-width: 0; }
}
"""


@dataclass(frozen=True)
class Heading:
    """The start of a section."""

    text: str
    level: Literal[2, 3] = 2
    """2 or 3; the title of the report is the only 1."""


@dataclass(frozen=True)
class Text:
    """Prose; an empty line starts a new paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of texts and numbers; a column of numbers is set flush right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"row must have {len(self.header)} cells, got {row}")


@dataclass(frozen=True)
class Picture:
    """A figure or an image, shown at most as wide as the page."""

    picture: Figure | Image.Image
    caption: str
    alt: str
    """Description of the picture for those who cannot see it."""


@dataclass(frozen=True)
class Commands:
    """Lines to copy into a terminal."""

    lines: Sequence[str]


Block = Heading | Text | Table | Picture | Commands


def write_report(path: str | os.PathLike[str], title: str, blocks: Sequence[Block]) -> None:
    """Write the blocks, in order, as one HTML file.

    The file appears whole or not at all: it is written beside and moved into place.
    """
    body = "\n".join([_element("h1", title), *(_html(block) for block in blocks)])
    page = f"""<!DOCTYPE html>
<html lang="en" xmlns="http://www.w3.org/1999/xhtml">
<head>
<meta charset="utf-8"/>
<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
{_element("title", title)}
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""
    content = page.encode()
    write_file(Path(path), lambda beside: beside.write_bytes(content), shared=True)


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return _element(f"h{level}", text)
        case Text(text):
            return "\n".join(_element("p", part) for part in text.split("\n\n"))
        case Table():
            return _table(block)
        case Picture():
            return _picture(block)
        case Commands(lines):
            return f"<pre>{_element('code', chr(10).join(lines))}</pre>"


def _table(table: Table) -> str:
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.header)
    kinds = [' class="number"' if _are_numbers(column) else "" for column in columns]
    lines = [_row("th", table.header, kinds), *(_row("td", row, kinds) for row in table.rows)]
    caption = _element("caption", table.caption) if table.caption else ""
    body = "\n".join(lines[1:])
    return (
        f'<div class="wide"><table>{caption}\n<thead>{lines[0]}</thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _row(tag: str, cells: Sequence[str | int | float], kinds: Sequence[str]) -> str:
    texts = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
    shown = (f"<{tag}{kind}>{_text(text)}</{tag}>" for text, kind in zip(texts, kinds, strict=True))
    return f"<tr>{''.join(shown)}</tr>"


def _are_numbers(cells: Sequence[str | int | float]) -> bool:
    """Tell whether all cells start as numbers do ("-1.5 %", "0.82 ± 0.01") or are empty."""
    return any(map(str, cells)) and all(
        isinstance(cell, int | float) or cell[:1] in "+-.0123456789" for cell in cells
    )


def _picture(block: Picture) -> str:
    buffer, width = BytesIO(), 0.0
    if isinstance(block.picture, Figure):
        block.picture.savefig(buffer, format="png")
        width = 100 * block.picture.get_figwidth()  # a hundred pixels an inch, whatever its dpi
    else:
        block.picture.save(buffer, format="png", optimize=True)
        width = block.picture.width
    source = f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"
    size = f'width="{width:.0f}" style="--width: {width:.0f}px"'
    image = f'<div class="wide"><img src="{source}" {size} alt="{_text(block.alt)}"/></div>'
    return f"<figure>{image}{_element('figcaption', block.caption)}</figure>"


def _element(tag: str, text: str) -> str:
    return f"<{tag}>{_text(text)}</{tag}>"


def _text(text: str) -> str:
    """Return any text as HTML that shows it: no mark-up, no character that XML does not allow."""
    return escape(printable(text))
