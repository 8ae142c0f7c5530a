"""Validation losses: paired, owned, and the same in any batch."""

import numpy as np
import pytest
import torch

from remixdit.evaluation import Held, interval_losses, loss_matrix
from remixdit.intervals import Intervals
from remixdit.model import RemixDiT
from tests.conftest import tiny_dit


def tiny_model() -> RemixDiT:
    model = RemixDiT.from_dit(tiny_dit(), 2, 5)
    model.mixture.perturb(0.5, torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def held() -> Held:
    generator = torch.Generator().manual_seed(0)
    return Held(torch.randn(12, 1, 8, 8, generator=generator), torch.arange(12) % 3)


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
