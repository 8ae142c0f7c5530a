"""What others wrote is shown, and does nothing to a terminal or a page."""

from xml.etree import ElementTree

import pytest
from PIL import Image

from remixdit.figures.html import Heading, Picture, Table, Text, write_report
from remixdit.figures.text import one_line, printable

EVIL = [
    "\x1b[2J\x1b]0;title\x07",  # clears the screen and renames the window
    "\x9b31m",  # the same as ESC [
    "cat\rdog\b\b",
    "\u202egnp.exe",  # turns the reading direction
    "\udcff",  # of a file name that is no valid unicode
    "\uffff",  # not allowed in XML
]


@pytest.mark.parametrize("text", EVIL)
def test_control_characters_are_shown_as_escapes(text):
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()
    assert one_line(f"a\n{text}") == f"a\\n{shown}"


def test_ordinary_text_of_any_language_stays_as_it_is():
    text = "Kätzchen 犬 e\u0301 कुत्ता\u200d 👩\u200d🚀 <b>\n\ttwo"
    assert printable(text) == text


@pytest.mark.parametrize("text", EVIL)
def test_a_report_of_control_characters_is_whole(tmp_path, text):
    picture = Picture(Image.new("L", (2, 2)), text, alt=text)
    write_report(
        tmp_path / "a.html", text, [Heading(text), Text(text), Table([text], [[text]]), picture]
    )
    root = ElementTree.fromstring((tmp_path / "a.html").read_text("utf-8"))
    shown = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("}td")]
    assert shown == [printable(text)]
