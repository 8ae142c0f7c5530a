"""Steps without finite gradients: skipped, counted, and not for ever."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from remixdit.training.run import read_metrics
from remixdit.training.step import Window
from tests.command_line import refusal, remixdit, write_npz
from tests.processes import assert_close_runs, assert_equal_runs, launch
from tests.tiny import save_tiny

BAD = 5  # the image that becomes infinite


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Latents of 24 images."""
    root = tmp_path_factory.mktemp("shards")
    save_tiny(root / "vae")
    data = write_npz(root / "pictures.npz")
    encode = f"encode {data} --output {root}/shards --image-size 16 --autoencoder {root}/vae"
    remixdit(f"{encode} --no-mirror")
    return root / "shards"


@pytest.fixture(scope="module")
def damaged(shards) -> Path:
    """The same, where one latent is infinite."""
    other = shards.with_name("damaged")
    shutil.copytree(shards, other)
    rows = np.load(other / "latents-00000.npy", mmap_mode="r+")
    rows[BAD, 0, 0, 0] = np.inf
    rows.flush()
    return other


def train(data: Path, run: Path, options: str = "") -> str:
    """Return the command of a run of 12 steps; an image is in one of six steps."""
    return (
        f"train tiny --data {data} --output-dir {run} --steps 12 --batch-size 4 --patch-size 2 "
        f"--experts-per-step 4 {options}"
    )


def test_a_bad_image_costs_its_steps_and_no_line_of_metrics(damaged, tmp_path):
    remixdit(train(damaged, tmp_path / "run", "--log-every 6"))
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [6, 10, 12]
    assert rows[-1]["skipped_steps"] == 2
    for row in rows:
        assert row["loss"] > 0
        assert row["grad_norm"] > 0
    state = json.loads((tmp_path / "run/checkpoints/step-00000012/state.json").read_text())
    assert state["skipped_steps"] == 2


def test_skipped_steps_survive_a_resumption_bit_for_bit(damaged, tmp_path):
    options = "--log-every 1 --weight-decay 0.1 --prior-strength 1e-3 --prior-schedule constant"
    for run, parts in (("whole", (12,)), ("parts", (5, 8, 12))):
        for steps in parts:
            remixdit(train(damaged, tmp_path / run, f"{options} --steps {steps}"))
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts", step=12)
    counts = [
        [row["skipped_steps"] for row in read_metrics(tmp_path / run)] for run in ("whole", "parts")
    ]
    assert counts[0] == counts[1]
    lines = read_metrics(tmp_path / "whole")
    assert [row["loss"] is None for row in lines].count(True) == 2  # those of a line every step


@pytest.mark.slow
@pytest.mark.parametrize("options", [pytest.param("", marks=pytest.mark.long), "--shard"])
def test_all_processes_skip_the_same_steps(options, damaged, tmp_path):
    line = "--log-every 4 --eps 1e-4 --basis-noise 0.3"
    remixdit(train(damaged, tmp_path / "one", line))
    launch(train(damaged, tmp_path / "two", f"{line} {options}"))
    assert_close_runs(tmp_path / "one", tmp_path / "two", step=12)
    found = [read_metrics(tmp_path / name)[-1]["skipped_steps"] for name in ("one", "two")]
    assert found == [2, 2]


def test_ten_skipped_steps_in_a_row_end_a_run_and_name_the_images(damaged, tmp_path, capsys):
    line = train(damaged, tmp_path / "run", "--batch-size 24 --log-every 100")
    message = refusal(line, capsys)
    assert message.startswith(
        "gradients must be finite, got 10 skipped steps in a row up to step 10: experts 0, 1, 2, "
        f"3, images {BAD} of the data; look at these images"
    )


def test_diverged_training_ends_in_one_line(data, tmp_path, capsys):
    line = f"train tiny --data {data} --output-dir {tmp_path}/run --learning-rate 1e30"
    message = refusal(f"{line} --log-every 1", capsys)
    assert "got 10 skipped steps in a row" in message
    assert "smaller --learning-rate" in message


def test_a_window_without_a_good_step_has_no_means():
    window = Window(2, torch.device("cpu"))
    strata, losses = torch.tensor([0, 1]), torch.tensor([1.0, torch.nan])
    window.add_losses(strata, losses, losses)
    window.end_step(torch.tensor([torch.nan, 1.0, 1.0]), torch.tensor(False))
    row = window.means(torch.tensor([0.5, 0.5]), 2)
    assert np.isnan([row["loss"], row["mse"], row["grad_norm"]]).all()
    assert row["loss_by_interval"] == [None, None]
    window.add_losses(strata, torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0]))
    window.end_step(torch.tensor([2.0, 1.0, 1.0]), torch.tensor(True))
    row = window.means(torch.tensor([0.5, 0.5]), 2)
    assert (row["loss"], row["mse"], row["grad_norm"]) == (2.0, 2.0, 2.0)
