"""Networks that were trained apart become one model."""

import pytest
import torch

from remixdit.model.model import RemixDiT
from tests.tiny import batch, tiny_dit


def plain(seed: int = 0, shape: dict | None = None, **stated: object) -> RemixDiT:
    return RemixDiT.from_dit(tiny_dit(seed, **(shape or {})), 1, 1, **stated)


@pytest.mark.parametrize(
    ("ratio", "total", "first_of_the_noisy"),
    [(0.875, 1000, 875), (0.55, 100, 55), (0.256, 100, 26)],
)
def test_the_second_network_owns_the_timesteps_from_the_ratio_on(ratio, total, first_of_the_noisy):
    low, high = tiny_dit(0), tiny_dit(1)
    model = RemixDiT.from_experts([low, high], boundary_ratio=ratio, num_train_timesteps=total)
    latents, _, labels = batch(low)
    for timestep in range(total):
        assert model.intervals.expert_at(torch.tensor([timestep])).item() == (
            timestep >= first_of_the_noisy
        )
    for timestep, owner in ((first_of_the_noisy - 1, low), (first_of_the_noisy, high)):
        timesteps = torch.full((len(latents),), timestep)
        with torch.no_grad():
            expected = owner(latents, timesteps, labels)
        output = model.denoise(latents, timesteps, labels)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_a_ratio_of_continuous_time_is_the_boundary():
    shape = {"learn_sigma": False}
    networks = [tiny_dit(seed, **shape) for seed in range(2)]
    options = {"prediction_type": "flow_prediction", "boundary_ratio": 0.9}
    assert RemixDiT.from_experts(networks, **options).intervals.boundaries == (0.0, 0.9, 1.0)


def test_what_models_state_is_kept():
    stated = {"prediction_type": "v_prediction", "num_train_timesteps": 50, "license": "mit"}
    model = RemixDiT.from_experts([plain(0, **stated), plain(1, **stated)], boundary_ratio=0.5)
    assert {name: getattr(model.config, name) for name in stated} == stated
    assert model.intervals.boundaries == (0, 25, 50)


@pytest.mark.parametrize(
    ("shape", "stated", "message"),
    [
        (
            {"hidden_size": 24},
            {},
            r"hidden_size of networks\[1\] must be 16, as for networks\[0\], got 24",
        ),
        ({}, {"num_train_timesteps": 50}, r"num_train_timesteps of networks\[1\] must be 1000, "),
        (
            {},
            {"prediction_type": "v_prediction"},
            r"prediction_type of .* epsilon, as for .*, got v_pred",
        ),
        ({}, {"class_names": ("a", "b", "d")}, "classes of .* adds 'd' and lacks 'c'"),
        ({}, {"class_names": ("b", "a", "c")}, r"class_names of .* in the order of networks\[0\]"),
        ({}, {"autoencoder": {"name": "x", "scaling_factor": 1.0}}, "scaling_factor of the autoen"),
        ({"timestep_embedding": "diffusers"}, {}, "timestep_embedding of .* dit, as for"),
    ],
)
def test_a_mismatch_is_named(shape, stated, message):
    autoencoder = {"name": "y", "scaling_factor": 0.5}
    first = plain(class_names=("a", "b", "c"), autoencoder=autoencoder)
    second = plain(1, shape, **{"autoencoder": autoencoder, **stated})
    with pytest.raises(ValueError, match=message):
        RemixDiT.from_experts([first, second])


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (3, {"boundary_ratio": 0.5}, "boundary_ratio must be given for 2 networks, got 3"),
        (2, {"boundary_ratio": 1.0}, r"boundary_ratio must be between 0 and 1, got 1\.0"),
        (2, {"boundary_ratio": 0.5, "boundaries": (0, 5, 1000)}, "boundaries must be left out"),
    ],
)
def test_a_ratio_without_meaning_is_refused(count, options, message):
    with pytest.raises(ValueError, match=message):
        RemixDiT.from_experts([tiny_dit(seed) for seed in range(count)], **options)


def test_a_mixture_is_no_expert():
    with pytest.raises(ValueError, match=r"num_experts of networks\[1\] must be 1.* got 3"):
        RemixDiT.from_experts([plain(), RemixDiT.from_dit(tiny_dit(1), 2, 3)])
