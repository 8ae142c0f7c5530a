"""When grids of samples are drawn during training, and that drawing changes nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest

from remixdit.training.config import OutputConfig, TrainConfig
from remixdit.training.loop import train
from remixdit.training.presets import PRESETS, train_config
from tests.command_line import remixdit, write_npz
from tests.processes import assert_equal_runs


def grids(run: Path) -> list[int]:
    """Return the steps of which there is a grid."""
    return sorted(int(path.stem.removeprefix("step-")) for path in (run / "samples").glob("*"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_draw_at_the_start_in_the_middle_and_at_the_end(name):
    changes = {"init_from": "plain"} if PRESETS[name].fine_tunes else {}
    config = train_config(name, data="shards", output_dir="run", **changes)
    due = [step for step in range(config.steps + 1) if config.output.samples_at(step, config.steps)]
    assert due == [0, config.steps // 2, config.steps]


def test_a_number_counts_from_the_start_and_none_means_never():
    every, never = OutputConfig(sample_every=3), OutputConfig()
    assert [step for step in range(8) if every.samples_at(step, 7)] == [3, 6, 7]
    assert not any(never.samples_at(step, 7) for step in range(8))


@pytest.fixture
def data(tmp_path) -> Path:
    return write_npz(tmp_path / "pictures.npz")


def test_drawing_does_not_change_training(data, tmp_path):
    line = f"train tiny --data {data} --steps 6 --log-every 1 --save-every 3"
    remixdit(f"{line} --output-dir {tmp_path}/with")
    remixdit(f"{line} --output-dir {tmp_path}/without --sample-every 0")
    assert grids(tmp_path / "with") == [0, 3, 6]
    assert not (tmp_path / "without" / "samples").exists()
    assert_equal_runs(tmp_path / "with", tmp_path / "without", 6)


def test_a_resumed_run_draws_what_is_still_due(data, tmp_path):
    line = f"train tiny --data {data} --output-dir {tmp_path}/run"
    remixdit(f"{line} --steps 2 --sample-every 0")
    remixdit(f"{line} --steps 6 --sample-images 4")
    assert grids(tmp_path / "run") == [3, 6]


def latents_run(data: Path, run: Path, **output: object) -> TrainConfig:
    """A run on latents whose autoencoder is gone."""
    config = train_config("tiny", data=data, output_dir=run, steps=2, batch_size=12)
    return replace(config, output=replace(config.output, **output))


def test_latents_that_nothing_here_decodes_train_without_grids(data, tmp_path, caplog, monkeypatch):
    def load_autoencoder(spec, device, offline):
        raise ValueError(f"autoencoder owner/name cannot be loaded, offline {offline}")

    monkeypatch.setattr("remixdit.training.trainer.load_autoencoder", load_autoencoder)
    list(train(latents_run(data, tmp_path / "run")))
    (warning,) = caplog.messages
    assert warning == (
        "no pictures of samples are drawn: autoencoder owner/name cannot be loaded, offline True"
    )
    assert (tmp_path / "run" / "model").is_dir()
    assert not (tmp_path / "run" / "samples").exists()
    with pytest.raises(ValueError, match="offline False"):  # grids that were asked for
        list(train(latents_run(data, tmp_path / "asked", sample_every=1)))
