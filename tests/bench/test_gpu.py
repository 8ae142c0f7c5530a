"""The benchmark for a GPU runs, on a CPU and a tiny network."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def gpu_benchmark(directory: Path, *options: str) -> dict:
    """Run it; return its JSON."""
    script = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--tiny", "--device", "cpu"]
    line = [*script, "--row-seconds", "0", "--output", str(directory), *options]
    subprocess.run(line, check=True, stdout=subprocess.PIPE, timeout=280)
    return json.loads((directory / "gpu.json").read_text())


@pytest.mark.slow
def test_every_row_is_measured(tmp_path):
    result = gpu_benchmark(tmp_path)
    assert result["left_out"] == 0
    assert [row for row in result["rows"] if "error" in row] == []
    trained = [row for row in result["rows"] if row["kind"] == "train"]
    assert len(trained) == 2 * 5
    for row in result["rows"]:
        is_ours = row["variant"] in ("remix M=5", "remix M=1", "mixed", "precomputed")
        assert is_ours == ("remix_over_plain" in row) == ("naive_over_remix" in row)
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("| train |") == len(trained)


def test_no_row_starts_without_time(tmp_path):
    result = gpu_benchmark(tmp_path, "--seconds", "0")
    assert (result["left_out"], result["rows"]) == (18, [])
    assert "Left out for want of time: 18" in (tmp_path / "gpu.md").read_text()


def test_a_row_that_does_not_fit_says_so(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks/gpu.py")
    gpu = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", gpu)
    spec.loader.exec_module(gpu)

    def too_large(_config: object) -> dict:
        raise torch.OutOfMemoryError

    job = gpu.jobs("cpu", tiny=True)[0]
    monkeypatch.setattr(gpu, "training_variants", too_large)
    assert gpu.measure(job, 0.0) == {"error": "out of memory"}


def test_it_imports_nothing_that_a_bare_machine_lacks():
    lacking = ("diffusers", "tyro", "gradio", "matplotlib", "tensorboard", "huggingface_hub")
    code = (
        "import sys, runpy; runpy.run_path(sys.argv[1]); "
        f"print([name for name in {lacking} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "benchmarks/gpu.py")],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout.strip() == "[]"
