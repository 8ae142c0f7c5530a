"""The commands of the documents: all are understood, and those marked `run` are run.

A block of commands in docs/ has a comment above it, which readers do not see:

    <!-- run -->                    it runs here, in order, on tiny stand-ins
    <!-- not run: the reason -->    its commands are only parsed

A page may say `<!-- commands not run: the reason -->` once for all of its other blocks.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import tyro
from diffusers.utils import dynamic_modules_utils

from remixdit.cli.main import main
from remixdit.diffusion.dit import DiT
from remixdit.training.presets import check_start
from tests.command_line import write_folder
from tests.tiny import save_tiny, tiny_dit

ROOT = Path(__file__).parents[2]
DATED = {"log.md", "performance.md"}  # commands as they were when something was measured
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text("utf-8")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if page.name not in DATED
}

BLOCK = re.compile(r"^(?:<!-- ([^>]*) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGE_MARK = re.compile(r"^<!-- commands not run: [^>]{10,} -->$", re.MULTILINE)
# Programs whose words nothing here can check.
OTHERS = {"git", "cd", "pip", "hf"}

# Options that make a command small. They come last, and the last of two equal options counts.
SMALLER = {
    "encode": "--image-size 16",
    "train": "--steps 2 --batch-size 20 --log-every 1 --device cpu --precision fp32 --no-compile "
    "--no-tensorboard",
    "bench": "--network 16x1/4 --input-size 8 --batch-size 4 --num-experts 4 --steps 1 --no-naive",
    "sample": "--num-images 4 --num-inference-steps 2",
    "evaluate": "--num-images 8 --num-inference-steps 2 --no-real-floor",
    "losses": "--num-images 4",
    "merge": "--num-images 4 --num-candidates 1",
    "import": "--num-heads 2",
}
SMALL_NETWORK = "--depth 1 --hidden-size 16 --num-heads 2"


class Block(NamedTuple):
    """A fenced block."""

    mark: str
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    return [Block(*found) for found in BLOCK.findall(PAGES[page])]


def is_shell(block: Block) -> bool:
    programs = OTHERS | {"remixdit", "./run", "python", "torchrun", "sbatch"}
    return block.language == "bash" or (
        not block.language and block.text.split(maxsplit=1)[0] in programs
    )


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command, without variables that are set for it."""
    variables: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        known = re.sub(r"\$(\w+)", lambda found: variables[found[1]], line)
        words = shlex.split(known, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def arguments_of(words: list[str]) -> list[str] | None:
    """Return what follows `remixdit` in a command, None if it is another program's."""
    if words[0] == "remixdit":
        return words[1:]
    if words[0] == "./run":
        return words[1:] if words[1] not in ("test", "install") else None
    if "-m" in words and words[words.index("-m") + 1] == "remixdit":
        return words[words.index("-m") + 2 :]
    return None


class Understood(BaseException):
    """The parser has understood a command, which must go no further."""


def check_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what is wrong with a command, "" if nothing is."""
    arguments = arguments_of(words)
    if arguments is None:
        return check_program(words)
    try:
        code = main(arguments)
    except Understood as understood:
        if arguments[0] == "train":
            check_start(arguments[1], understood.args[0].init_from)
        return ""
    is_help = "--help" in arguments and code == 0
    return "" if is_help else f"{shlex.join(words)}: {capsys.readouterr().err}"


def check_program(words: list[str]) -> str:
    """Return what is wrong with a command of another program."""
    if words[0] in OTHERS or words[0] == "./run":
        return ""
    if words[0] not in ("python", "sbatch") or not (ROOT / words[1]).is_file():
        return f"{shlex.join(words)}: there is no such program"
    source = (ROOT / words[1]).read_text("utf-8")
    unknown = [word for word in words if word.startswith("--") and f'"{word}"' not in source]
    return f"{shlex.join(words)}: {unknown}" if unknown else ""


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(page, monkeypatch, capsys):
    real = tyro.cli

    def parse_only(*given, **options):
        raise Understood(real(*given, **options))

    monkeypatch.setattr(tyro, "cli", parse_only)
    found = [words for block in blocks(page) if is_shell(block) for words in commands(block.text)]
    assert [wrong for words in found if (wrong := check_command(words, capsys))] == []


def test_a_typo_is_not_understood(capsys):
    for line in ("remixdit sample run --output a.png --num-image 4", "remixdit trian s2"):
        assert line in check_command(line.split(), capsys)
    assert "no such program" in check_command(["python", "examples/own_lop.py"], capsys)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_every_block_of_commands_runs_or_says_why_not(page):
    stated = re.compile(r"run|not run: .{10,}")
    if PAGE_MARK.search(PAGES[page]):
        return
    unmarked = [
        block.text for block in blocks(page) if is_shell(block) and not stated.fullmatch(block.mark)
    ]
    assert unmarked == []


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_compiles_and_its_names_exist(page):
    for block in blocks(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text, page)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("remixdit"):
                module = import_module(node.module)
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.mark == "run" for block in blocks(page))]
)
def test_marked_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    write_stand_ins()
    names: dict[str, object] = {"__name__": page}
    for block in blocks(page):
        if block.mark != "run":
            continue
        if block.language == "python":
            exec(compile(block.text, page, "exec"), names)
            continue
        for words in commands(block.text):
            assert main(smaller(arguments_of(words))) == 0, shlex.join(words)


def smaller(arguments: list[str]) -> list[str]:
    """Return a command with options that make it take a second."""
    if "--self-test" in arguments:
        return arguments
    options = SMALLER.get(arguments[0], "").split()
    if arguments[0] == "train":
        options += SMALL_NETWORK.split() if "--from" not in arguments else []
        options += ["--micro-batch-size", "10"] if "--micro-batch-size" in arguments else []
    return [*arguments, *options]


def write_stand_ins() -> None:
    """Write, under the names that the pages use, what their readers have."""
    write_folder(Path("photos"), cats=12, dogs=12)
    write_folder(Path("held-out"), cats=6, dogs=6)
    save_tiny(Path("stabilityai/sd-vae-ft-ema"))
    network: DiT = tiny_dit(input_size=8, in_channels=4, num_classes=2)
    weights = {**network.state_dict(), "pos_embed": network.pos_embed}
    torch.save(weights, "DiT-XL-2-256x256.pt")
    Path("latents").mkdir()
    Path("latents/imagenet").symlink_to("train")  # has the classes of the model
