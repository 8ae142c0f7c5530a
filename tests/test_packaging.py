"""What a package index shows and installs."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

from remixdit import __version__
from remixdit.cli.main import main
from tests.command_line import write_npz
from tests.processes import environment

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
LINK = re.compile(r'\]\(([^)\s]+)\)|src="([^"]+)"')

# What a user writes; only the last line is wrong.
USER = """\
import torch
from remixdit import Experts, remix

experts: Experts = remix(torch.nn.Sequential(torch.nn.Linear(4, 4)), 2, 4, mixed="*")
expert: str = experts.plain(3)
"""


def published_readme() -> str:
    """Return the README as the build writes it into the package."""
    text = (REPOSITORY / "README.md").read_text()
    for rule in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    return text


def test_links_and_pictures_of_the_readme_resolve_on_a_package_index():
    given = [a or b for a, b in LINK.findall((REPOSITORY / "README.md").read_text())]
    published = [a or b for a, b in LINK.findall(published_readme())]
    assert len(given) == len(published) > 5
    for before, after in zip(given, published, strict=True):
        if before.startswith(("https:", "#")):
            assert after == before
            continue
        path = REPOSITORY / before.partition("#")[0]
        assert path.exists(), before
        repository = "https://github.com/remixdit/remixdit/blob/main/"
        if path.suffix in (".png", ".svg", ".gif", ".jpg", ".webp"):
            repository = "https://raw.githubusercontent.com/remixdit/remixdit/main/"
        assert after == repository + before


def test_the_version_is_stated_once(capsys):
    assert "version" in PROJECT["project"]["dynamic"]
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"remixdit {__version__}\n"


def test_all_stated_pythons_run_the_checks():
    (job,) = yaml.safe_load((REPOSITORY / ".github/workflows/checks.yml").read_text())[
        "jobs"
    ].values()
    assert job["steps"][-1] == {"run": ".ci/run"}
    prefix = "Programming Language :: Python :: 3."
    stated = [name for name in PROJECT["project"]["classifiers"] if name.startswith(prefix)]
    assert [name.rpartition(" ")[2] for name in stated] == job["strategy"]["matrix"]["python"]


def clean(words: list[str | Path], directory: Path) -> str:
    """Run a program as outside of this repository; return what it printed."""
    given = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=directory,
        env=given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Return the programs of an empty environment with the wheel, which was built from the sdist.

    REMIXDIT_PYTHON names another Python, such as python3.13.
    """
    directory = tmp_path_factory.mktemp("installed")
    python = os.environ.get("REMIXDIT_PYTHON", sys.executable)
    for name in ("builder", "venv"):
        clean([python, "-m", "venv", directory / name], directory)
    builder = [directory / "builder" / "bin" / "python", "-m"]
    words = [*builder, "pip", "-q", "install", "build", "hatchling"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no packages: {done.stderr.strip().splitlines()[-1]}")
    clean([*builder, "build", "-o", "dist", REPOSITORY], directory)
    (wheel,) = (directory / "dist").glob("*.whl")
    programs = directory / "venv" / "bin"
    pip = [programs / "python", "-m", "pip", "-q"]
    version = torch.__version__.partition("+")[0]
    clean([*pip, "install", f"torch=={version}", wheel], directory)
    return programs


@pytest.mark.long
def test_the_wheel_trains_draws_and_exports_outside_the_repository(installed, tmp_path):
    write_npz(tmp_path / "pictures.npz")
    clean([installed / "python", "-m", "pip", "check"], tmp_path)
    remixdit = installed / "remixdit"
    assert clean([remixdit, "--version"], tmp_path) == f"remixdit {__version__}\n"
    for line in (
        "train tiny --data pictures.npz --output-dir run --steps 4",
        "sample run --num-images 4 --num-inference-steps 4 --output grid.png",
        "export run --format experts --output experts",
        "export run --format pipeline --output pipeline",
    ):
        clean([remixdit, *line.split()], tmp_path)
    about = json.loads((tmp_path / "experts" / "experts.json").read_text())
    assert len(about["experts"]) == 4
    script = "import remixdit, sys; print(remixdit.__file__)"
    assert str(installed.parent) in clean([installed / "python", "-c", script], tmp_path)


@pytest.mark.long
def test_a_type_checker_sees_the_types_of_the_wheel(installed, tmp_path):
    (tmp_path / "user.py").write_text(USER)
    words = [sys.executable, "-m", "mypy", "--strict", "--python-executable"]
    done = subprocess.run(
        [*words, str(installed / "python"), "user.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, done.stdout
    assert errors[0].startswith("user.py:5: error: Incompatible types in assignment")
