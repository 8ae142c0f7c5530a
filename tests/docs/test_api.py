"""What docs/api.rst shows has docstrings that name every parameter and field."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import remixdit

API = Path(__file__).parents[2] / "docs" / "api.rst"
DIRECTIVE = re.compile(r"^\.\. auto(?:class|function):: (\S+)((?:\n   :.*)*)", re.MULTILINE)
SHOWN = dict(DIRECTIVE.findall(API.read_text("utf-8")))  # name: options


def thing(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module or "remixdit"), attribute)


def members(name: str) -> Iterator[tuple[str, object]]:
    """Yield what the page shows of a name: itself, and methods of its own."""
    shown, options = thing(name), SHOWN[name]
    yield name, shown
    chosen = re.search(r":members:(.*)", options)
    if not inspect.isclass(shown) or chosen is None:
        return
    only = set(chosen.group(1).replace(",", " ").split())
    left_out = set(
        " ".join(re.findall(r":exclude-members:(.*)", options)).replace(",", " ").split()
    )
    for member, value in vars(shown).items():
        wanted = not member.startswith("_") and member not in left_out
        if wanted and (not only or member in only) and is_method(value):
            yield f"{name}.{member}", value


def is_method(value: object) -> bool:
    return inspect.isfunction(value) or isinstance(value, classmethod | property)


def parameters(value: object) -> set[str]:
    """Return the parameters that a docstring has to name."""
    if isinstance(value, property) or dataclasses.is_dataclass(value):
        return set()
    function = value.__func__ if isinstance(value, classmethod) else value
    return set(inspect.signature(function).parameters) - {"self", "cls", "args"}


def undocumented(value: object) -> set[str]:
    """Return the parameters that a docstring leaves out."""
    text = inspect.getdoc(value) or ""
    if re.search(r"[Ss]hapes as for `\w+`", text):
        return set()
    return {name for name in parameters(value) if not re.search(rf"(^|`|\s){name}(:|`)", text)}


def test_the_page_shows_every_public_name():
    assert set(remixdit.__all__) <= set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_every_docstring_names_its_parameters(name):
    missing = {member: undocumented(value) for member, value in members(name)}
    assert {member: names for member, names in missing.items() if names} == {}
    assert [member for member, value in members(name) if not inspect.getdoc(value)] == []


@pytest.mark.parametrize("name", [name for name in SHOWN if dataclasses.is_dataclass(thing(name))])
def test_every_field_of_a_configuration_has_a_docstring(name):
    """The class names it among its arguments, or it is a configuration itself."""
    shown = thing(name)
    body = ast.parse(inspect.getsource(shown)).body[0].body
    bare = [
        field.target.id
        for field, after in zip(body, [*body[1:], None], strict=True)
        if isinstance(field, ast.AnnAssign)
        and not is_docstring(after)
        and not ast.unparse(field.annotation).endswith("Config")
    ]
    assert [field for field in bare if f"{field}: " not in (shown.__doc__ or "")] == []


def is_docstring(node: ast.stmt | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
