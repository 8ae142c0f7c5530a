"""Whole runs of every kind, and what they leave behind."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from remixdit.diffusion.dit import DiTConfig
from remixdit.model.loading import load_model
from remixdit.training.config import MixtureConfig, ObjectiveConfig, OutputConfig, TrainConfig
from remixdit.training.loop import train
from remixdit.training.optimizer import OptimizerConfig
from remixdit.training.run import COEFFICIENTS_FILE, read_metrics
from remixdit.training.strata import cut_intervals


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Twelve noisy grey images of three classes, in an npz."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    images = generator.integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    np.savez(path, arr_0=images, arr_1=np.arange(12) % 3)
    return path


def tiny_run(data: Path, output_dir: Path, **fields: object) -> TrainConfig:
    settings = {
        "steps": 4,
        "batch_size": 8,
        "image_size": 8,
        "device": "cpu",
        "network": DiTConfig(patch_size=2, hidden_size=16, depth=2, num_heads=2),
        "mixture": MixtureConfig(num_bases=2, num_experts=4),
        "output": OutputConfig(log_every=2, save_every=2, tensorboard=False),
    }
    return TrainConfig(data=str(data), output_dir=output_dir, **{**settings, **fields})


FLOW = ObjectiveConfig(prediction_type="flow_prediction", logit_normal=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"mixture": MixtureConfig(num_bases=2, num_experts=4, experts_per_step=1)},
        {"mixture": MixtureConfig(num_bases=2, num_experts=4, experts_per_step=3)},
        {"mixture": MixtureConfig(num_bases=2, num_experts=4, per_block=True)},
        {"mixture": MixtureConfig(num_bases=2, num_experts=4, coefficients="raw")},
        {"mixture": MixtureConfig(num_bases=4, num_experts=4, coefficients="one_hot")},
        {"mixture": MixtureConfig(num_bases=2, num_experts=4, mixed="all", basis_noise=0.01)},
        {"mixture": MixtureConfig(num_bases=2, num_experts=4, intervals="log_snr")},
        {"mixture": MixtureConfig(num_bases=2, num_experts=4, prior_strength=0.1)},
        {"mixture": MixtureConfig(num_bases=1, num_experts=1)},
        {"objective": ObjectiveConfig(prediction_type="v_prediction")},
        {"objective": FLOW},
        {
            "objective": FLOW,
            "mixture": MixtureConfig(num_bases=2, num_experts=4, intervals="log_snr"),
        },
        {"precision": "bf16"},
        {"micro_batch_size": 3},
        {"optimizer": OptimizerConfig(algorithm="muon")},
    ],
)
def test_every_kind_of_run_learns_and_leaves_a_model(fields, digits, tmp_path):
    config = tiny_run(digits, tmp_path / "run", **fields)
    steps = [p.done for p in train(config) if p.stage == "train"]
    assert steps == [1, 2, 3, 4]
    rows = read_metrics(config.output_dir)
    assert [row["step"] for row in rows] == [2, 4]
    assert all(np.isfinite(row["loss"]) for row in rows)
    model = load_model(config.output_dir)
    assert model.num_experts == config.mixture.num_experts
    if config.mixture.prior_strength:
        assert rows[0]["logits_prior_grad"] > 0
        assert rows[-1]["prior_strength"] == 0


def test_tensorboard_shows_losses_gradients_coefficients_and_samples(digits, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = OutputConfig(log_every=2, save_every=4, sample_every=4, sample_inference_steps=2)
    config = tiny_run(digits, tmp_path / "run", output=output)
    list(train(config))
    events = EventAccumulator(str(config.output_dir / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"coefficients", "samples"} <= set(tags["images"])
    wanted = {"loss", "logits_task_grad", "logits_prior_grad", "loss_by_interval/003"}
    assert wanted <= set(tags["scalars"])
    with Image.open(config.output_dir / "samples" / "step-00000004.png") as grid:
        assert grid.width > 100


def test_images_without_labels_train_an_unconditional_model(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", arr_0=images)
    config = tiny_run(tmp_path / "plain.npz", tmp_path / "run")
    list(train(config))
    assert load_model(config.output_dir).config.network.num_classes == 0


def test_a_mixture_that_is_trained_on_keeps_its_intervals(digits, tmp_path):
    uniform = MixtureConfig(num_bases=2, num_experts=4, intervals="uniform")
    first = tiny_run(digits, tmp_path / "first", mixture=uniform)
    list(train(first))
    second = tiny_run(digits, tmp_path / "second", init_from=str(first.output_dir))
    list(train(second))
    boundaries = [load_model(run.output_dir).intervals.boundaries for run in (first, second)]
    assert boundaries == [(0, 250, 500, 750, 1000)] * 2
    third = tiny_run(digits, tmp_path / "third")
    list(train(third))
    found = load_model(third.output_dir)
    assert found.intervals.boundaries == cut_intervals(found.config, 4, "loss").boundaries


def test_tables_of_coefficients_are_recorded_ever_more_seldom(digits, tmp_path):
    output = OutputConfig(log_every=1, save_every=200, tensorboard=False)
    config = tiny_run(digits, tmp_path / "run", steps=135, output=output)
    list(train(config))
    rows = read_metrics(config.output_dir, COEFFICIENTS_FILE)
    steps = [*range(64), *range(64, 128, 2), *range(128, 135, 4), 135]
    assert [row["step"] for row in rows] == steps
    tables = np.array([row["coefficients"] for row in rows])
    assert tables.shape == (len(steps), config.mixture.num_experts, config.mixture.num_bases)
    assert np.allclose(tables.sum(2), 1, atol=1e-3)
    last = load_model(config.output_dir, ema=False).experts.coefficients().detach().numpy()[0]
    assert np.allclose(tables[-1], last, atol=1e-4)
