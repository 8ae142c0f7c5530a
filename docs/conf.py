"""The documents as a site: sphinx-build -W -b html docs docs/_build."""

import dataclasses
import re
from typing import Any

import remixdit

project = "remixdit"
author = copyright = "The remixdit authors"
version = release = remixdit.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "README.md", "results/*/*/start"]  # index.rst includes the README
highlight_language = "text"
html_theme = "furo"
html_title = "remixdit"
html_theme_options = {
    "source_repository": "https://github.com/remixdit/remixdit",
    "source_branch": "main",
    "source_directory": "docs/",
}
myst_heading_anchors = 3  # links to #a-heading work here as they do on GitHub

default_role = "code"  # docstrings write `name` for code
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_use_ivar = True
napoleon_use_rtype = False


COLON = "\ue000"  # no docstring has this character


def before_napoleon(app: Any, what: str, name: str, *rest: Any) -> None:
    """Keep what napoleon and reStructuredText would take for markup of theirs.

    A * as in the shape (K, *) opens emphasis, and what stands before a colon in the docstring of a
    field becomes its type.
    """
    lines: list[str] = rest[-1]
    for index, line in enumerate(lines):
        text = re.sub(r"(?<![\w*])\*(?![\w*])", r"\*", line)
        lines[index] = text.replace(":", COLON) if what in ("attribute", "property") else text


def after_napoleon(*event: Any) -> None:
    """Put the colons back."""
    lines: list[str] = event[-1]
    lines[:] = [line.replace(COLON, ":") for line in lines]


def without_fields(
    app: Any, what: str, name: str, thing: Any, *rest: Any
) -> tuple[str, str] | None:
    """Leave the fields of a configuration out of its signature: they are listed below it."""
    return ("", "") if dataclasses.is_dataclass(thing) and name.endswith("Config") else None


def setup(app: Any) -> None:
    """Connect what changes docstrings and signatures."""
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)  # napoleon has 500
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
    app.connect("autodoc-process-signature", without_fields)
