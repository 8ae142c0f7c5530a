"""Validation losses: paired, owned, and the same in any batch."""

import numpy as np
import pytest
import torch

from remixdit.diffusion.intervals import Intervals, float32_at_least, float32_below
from remixdit.evaluation.held_out import HeldOut
from remixdit.evaluation.losses import interval_losses, loss_matrix
from remixdit.model.config import RemixConfig
from remixdit.model.model import RemixDiT
from tests.tiny import tiny_config, tiny_dit, tiny_model


@pytest.fixture
def held() -> HeldOut:
    generator = torch.Generator().manual_seed(0)
    return HeldOut(torch.randn(12, 1, 8, 8, generator=generator), torch.arange(12) % 3)


def test_the_diagonal_of_the_matrix_is_each_owner_on_its_own_interval(held):
    model = tiny_model()
    matrix = loss_matrix(model, held)
    assert matrix.shape == (5, 5)
    owned = interval_losses(model, held, model.intervals)[0].mean(-1)
    np.testing.assert_allclose(np.diag(matrix), owned)


def test_losses_equal_denoising_image_by_image(held):
    model = tiny_model()
    losses = interval_losses(model, held, model.intervals)[0]  # (I, n)
    again = interval_losses(model, held, model.intervals, batch_size=1)[0]
    np.testing.assert_allclose(losses, again, rtol=1e-4)


def test_a_plain_dit_is_measured_on_the_intervals_of_a_mixture(held):
    """The same weights, timesteps and noise: the same losses, whoever owns the interval."""
    plain = RemixDiT.from_dit(tiny_dit(), 1, 1)
    remixed = RemixDiT.from_dit(tiny_dit(), 2, 5)
    first = interval_losses(plain, held, remixed.intervals)
    second = interval_losses(remixed, held, remixed.intervals)
    np.testing.assert_allclose(first, second, rtol=1e-4)


def test_noise_is_paired_by_seed(held):
    model = tiny_model()
    same = [interval_losses(model, held, Intervals.uniform(5), seed=3) for _ in range(2)]
    assert np.array_equal(*same)
    other = interval_losses(model, held, Intervals.uniform(5), seed=4)
    assert not np.array_equal(same[0], other)


def test_an_interval_of_several_owners_is_measured_with_each(held):
    """One interval over all timesteps: every image by the expert of its own timestep."""
    model = tiny_model()
    seen = []
    original = model.predict

    def watched(expert, latents, timesteps, class_labels):
        assert (model.intervals.expert_at(timesteps) == expert).all()
        seen.append(expert)
        return original(expert, latents, timesteps, class_labels)

    model.predict = watched
    losses = interval_losses(model, held, Intervals.uniform(1))
    assert losses.shape == (1, 1, 12)
    assert np.isfinite(losses).all()
    assert len(set(seen)) > 1


def test_boundaries_of_continuous_time_have_their_owners():
    """0.7 in float32 is below 0.7: it must not fall to the interval before."""
    config = RemixConfig(
        network=tiny_config(learn_sigma=False),
        num_bases=1,
        num_experts=10,
        prediction_type="flow_prediction",
    )
    model = RemixDiT(config)
    for expert in range(10):
        low, high = (model.intervals.boundaries[expert + side] for side in (0, 1))
        ends = torch.stack([float32_at_least(low), float32_below(high)])
        assert model.intervals.expert_at(ends).tolist() == [expert, expert]
