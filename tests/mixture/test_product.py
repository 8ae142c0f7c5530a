"""The mix of weights in the dtype of the arithmetic."""

import pytest
import torch

from remixdit.mixture.product import mix
from remixdit.mixture.remix import remix
from tests.tiny import batch, perturb, tiny_dit


def test_float32_weights_are_the_weighted_sum():
    generator = torch.Generator().manual_seed(0)
    bases = torch.randn(3, 5, 7, generator=generator)
    coefficients = torch.rand(4, 3, generator=generator)
    expected = torch.einsum("mk,koi->moi", coefficients, bases)
    torch.testing.assert_close(mix(bases, coefficients, torch.float32), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_as_near_as_their_dtype_allows(dtype):
    """Coefficients that were rounded would scale the whole matrix; these are not."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    coefficients = torch.rand(5, 4, generator=generator).softmax(-1)
    found = mix(weight.expand(4, -1, -1), coefficients, dtype).double()
    errors = (found - weight) / weight
    assert errors.abs().max() < 2 * torch.finfo(dtype).eps
    assert errors.mean((1, 2)).abs().max() < 0.1 * torch.finfo(dtype).eps


def test_frozen_bases_get_no_gradients_and_change_those_of_the_coefficients_by_nothing():
    grads = []
    for frozen in (False, True):
        network = tiny_dit()
        experts = remix(network, 3, 5, mixed="all")
        perturb(experts)
        for bases in experts.bases().values():
            bases.requires_grad_(not frozen)
        with experts.route([0, 1, 2, 3, 4, 4]):
            network(*batch(network)).square().mean().backward()
        grads.append(experts.logits.grad)
        assert all((bases.grad is None) == frozen for bases in experts.bases().values())
    assert torch.equal(*grads)
    assert grads[0].abs().sum() > 0
