"""Texts of others, such as names of classes and licences, made safe to show.

A control character in a name could move the cursor, rename the window or write a line of its own;
a direction mark could turn what is read around. Both are shown as escapes instead.
"""

import re

__all__ = ["one_line", "printable"]

# C0 but tab and newline, DEL and C1 (0x9b begins a sequence too), direction and line marks, halves
# of surrogate pairs (a file name that is no valid unicode), and what XML does not allow.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def printable(text: str) -> str:
    """Return a text of one or more lines with all that is not text shown as escapes."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Return a text as one printable line."""
    return printable(text.replace("\n", "\\n"))
