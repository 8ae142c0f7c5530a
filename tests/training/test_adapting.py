"""A given model for other data, labels or experts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from remixdit.diffusion.intervals import Intervals, LogitNormal
from remixdit.model.config import RemixConfig
from remixdit.model.loading import load_model
from remixdit.model.model import RemixDiT
from remixdit.training.adapting import resampled
from remixdit.training.config import MixtureConfig, ObjectiveConfig, OutputConfig, TrainConfig
from remixdit.training.loop import train
from remixdit.training.start import Outline, Start, starting_model
from remixdit.training.strata import cut_intervals
from tests.tiny import batch, perturb, tiny_config, tiny_dit

PETS = ("cat", "dog", "elk")
DATA = Outline((1, 8, 8), PETS, {"name": "none"})


def given(directory: Path, num_experts: int = 1, **options: object) -> RemixDiT:
    """Write a model of cats, dogs and elks, and return it."""
    options = {"class_names": PETS, **options}
    model = RemixDiT.from_dit(tiny_dit(), min(2, num_experts), num_experts, **options)
    if num_experts > 1:
        perturb(model.experts)
        with torch.no_grad():
            model.experts.logits.add_(torch.randn(model.experts.logits.shape))
    model.save_pretrained(directory)
    return model.eval()


def started(directory: Path, data: Outline = DATA, num_experts: int = 1, **changes) -> RemixDiT:
    """Return the model with which a run from a given model begins."""
    start = start_of(directory, data, num_experts, **changes)
    model = RemixDiT.empty(start.config)
    start.fill(model, torch.device("cpu"))
    return model.eval()


def start_of(directory: Path, data: Outline, num_experts: int, **changes) -> Start:
    mixture = MixtureConfig(num_bases=min(2, num_experts), num_experts=num_experts)
    settings = {"mixture": mixture, **changes}
    config = TrainConfig(
        data="", output_dir=directory / "run", init_from=str(directory), **settings
    )
    return starting_model(config, data)


@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("mixed", ["attention+mlp", "all"])
def test_a_start_numbers_classes_as_the_data_do(mixed, num_experts, tmp_path):
    before = given(tmp_path, num_experts, mixed=mixed)
    turned = DATA._replace(class_names=("elk", "cat", "dog"))
    mixture = MixtureConfig(num_bases=min(2, num_experts), num_experts=num_experts, mixed=mixed)
    after = started(tmp_path, turned, num_experts, mixture=mixture)
    assert after.config.class_names == ("elk", "cat", "dog")
    latents, timesteps, _ = batch(before.network, 4)
    ours, theirs = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 0, 3])  # cat, dog, elk, null
    expected = before.denoise(latents, timesteps, ours)
    assert torch.equal(after.denoise(latents, timesteps, theirs), expected)


@pytest.mark.parametrize("num_experts", [1, 4])
def test_a_start_of_other_classes_is_refused_by_name(num_experts, tmp_path):
    given(tmp_path, num_experts)
    fruits = DATA._replace(class_names=("apple", "cat", "dog"))
    with pytest.raises(ValueError, match="adds 'apple' and lacks 'elk'; --new-labels learns"):
        started(tmp_path, fruits, num_experts)


def test_numbered_data_leave_a_model_its_names(tmp_path):
    given(tmp_path)
    counted = DATA._replace(class_names=("0", "1", "2"))
    assert started(tmp_path, counted).config.class_names == PETS
    assert started(tmp_path, counted, new_labels=True).config.class_names == ("0", "1", "2")


@pytest.mark.parametrize("mixed", ["attention+mlp", "all"])
def test_new_labels_leave_the_rest_of_a_mixture_as_it_was(mixed, tmp_path):
    before = given(tmp_path, 4, mixed=mixed).weights()
    fruits = DATA._replace(class_names=("apple", "pear"))
    mixture = MixtureConfig(num_bases=2, num_experts=4, mixed=mixed)
    after = started(tmp_path, fruits, mixture=mixture, new_labels=True).weights()
    table = next(name for name in after if "y_embedder" in name)
    assert after[table].shape[-2] == 3
    assert all(torch.equal(values, before[n]) for n, values in after.items() if n != table)


def test_another_image_size_keeps_all_weights_of_a_mixture(tmp_path):
    before = given(tmp_path, 4).weights()
    after = started(tmp_path, DATA._replace(shape=(1, 12, 12)), 4)
    assert after.config.network.input_size == 12
    assert all(torch.equal(values, before[name]) for name, values in after.weights().items())


@pytest.mark.parametrize("per_block", [False, True])
def test_a_mixture_that_is_cut_finer_starts_as_the_same_function(per_block, tmp_path):
    before = given(tmp_path, 4, per_block=per_block)  # of equal width in timesteps
    mixture = MixtureConfig(num_bases=2, num_experts=8, per_block=per_block, intervals="uniform")
    after = started(tmp_path, mixture=mixture)
    inputs = batch(before.network, 12)
    twice = before.experts.logits.repeat_interleave(2, -2)
    assert torch.equal(after.experts.logits, twice)
    torch.testing.assert_close(after.denoise(*inputs), before.denoise(*inputs))
    remark = start_of(tmp_path, DATA, 8, mixture=mixture).remark
    assert remark == (
        "the coefficients of the 4 experts of --from are resampled to 8; --num-experts 4 keeps them"
    )


def test_a_new_expert_has_the_mean_of_what_its_interval_held():
    table = torch.tensor([[0.0, 4.0], [2.0, 0.0], [6.0, 8.0]])
    before, after = Intervals((0, 100, 200, 1000)), Intervals((0, 50, 250, 1000))
    expected = [[0.0, 4.0], [(0 + 2 * 2 + 6) / 4, (4 + 2 * 0 + 8) / 4], [6.0, 8.0]]
    torch.testing.assert_close(resampled(table, before, after), torch.tensor(expected))
    times = Intervals((0.0, 0.5, 1.0)), Intervals((0.0, 0.25, 1.0))
    found = resampled(table[:2], *times)
    torch.testing.assert_close(found, torch.tensor([[0.0, 4.0], [4 / 3, 4 / 3]]))


def test_frozen_coefficients_are_not_resampled(tmp_path):
    given(tmp_path, 4, coefficients="one_hot")
    mixture = MixtureConfig(num_bases=2, num_experts=8, coefficients="one_hot")
    with pytest.raises(ValueError, match="num_experts must be that of --from, 4, got 8"):
        started(tmp_path, mixture=mixture)


@pytest.mark.parametrize("num_experts", [1, 4])
def test_a_run_takes_prediction_and_timesteps_of_the_model_that_it_starts_from(
    num_experts, tmp_path
):
    given(tmp_path, num_experts, prediction_type="v_prediction", num_train_timesteps=250)
    config = started(tmp_path, num_experts=num_experts).config
    assert (config.prediction_type, config.num_train_timesteps) == ("v_prediction", 250)
    assert config.boundaries[-1] == 250
    with pytest.raises(ValueError, match="--prediction-type must be that of --from, v_prediction"):
        started(
            tmp_path, num_experts=num_experts, objective=ObjectiveConfig(prediction_type="epsilon")
        )


def test_a_model_of_other_timesteps_is_trained_as_it_was(tmp_path):
    given(tmp_path / "given", num_train_timesteps=250)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((8, 8, 8, 1), np.uint8), arr_1=np.arange(8) % 3)
    config = TrainConfig(
        data=str(tmp_path / "a.npz"),
        output_dir=tmp_path / "run",
        init_from=str(tmp_path / "given"),
        steps=1,
        batch_size=8,
        mixture=MixtureConfig(num_bases=2, num_experts=4),
        output=OutputConfig(tensorboard=False),
    )
    list(train(config))
    found = load_model(config.output_dir).config
    assert (found.num_train_timesteps, found.boundaries[-1]) == (250, 250)


def test_continuous_time_is_taken_from_a_model_too(tmp_path):
    network = replace(tiny_config(), learn_sigma=False)
    flow = {"prediction_type": "flow_prediction"}
    model = RemixDiT(RemixConfig(network=network, num_bases=1, num_experts=1, **flow))
    model.save_pretrained(tmp_path)
    found = started(tmp_path, num_experts=4, objective=ObjectiveConfig(logit_normal=True)).config
    assert found.is_flow
    assert found.boundaries == cut_intervals(found, 4, "loss", LogitNormal()).boundaries
    assert isinstance(found.boundaries[0], float)
