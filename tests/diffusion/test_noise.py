"""Losses and posteriors against the published ones, and identities of each process."""

import pytest
import torch

from remixdit.diffusion.noise import (
    Diffusion,
    Flow,
    discretized_log_likelihood,
    linear_betas,
    normal_cdf,
    normal_kl,
)
from tests.tiny import published_dit

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def test_losses_equal_the_published_ones(given, settings):
    network, diffusion = published_dit(given, settings), Diffusion()
    latents, noise, timesteps = (given[f"loss.{n}"] for n in ("x_start", "noise", "timesteps"))
    noisy = diffusion.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy, given["loss.x_t"], **CLOSE)
    with torch.no_grad():
        output = network(noisy, timesteps, given["dit.class_labels"])
    loss = diffusion.loss(output, latents, noise, timesteps)
    assert 0 in timesteps  # the discretised likelihood is among them
    torch.testing.assert_close(loss.total, given["loss.loss"], **CLOSE)
    torch.testing.assert_close(loss.mse, given["loss.mse"], **CLOSE)
    torch.testing.assert_close(loss.variance_bound, given["loss.vb"], **CLOSE)


def test_the_posterior_equals_the_published_one(given):
    posterior = Diffusion().posterior(
        given["dit.output"], given["dit.latents"], given["dit.timesteps"]
    )
    for ours, name in zip(posterior, ("mean", "log_variance", "pred_xstart"), strict=True):
        torch.testing.assert_close(ours, given[f"posterior.{name}"], **CLOSE)


@pytest.mark.parametrize("steps", [10, 25])
def test_respaced_steps_equal_the_published_ones(steps, given, settings):
    spaced = torch.tensor(settings[f"ddim{steps}.timesteps"])
    index = torch.full((6,), settings[f"ddpm{steps}.index"])
    assert spaced[index[0]] == settings[f"ddpm{steps}.timestep"]
    network = published_dit(given, settings)
    with torch.no_grad():
        output = network(given["dit.latents"], spaced[index], given["dit.class_labels"])
    respaced = Diffusion().respaced(spaced)
    posterior = respaced.posterior(output, given["dit.latents"], index)
    torch.testing.assert_close(posterior.mean, given[f"ddpm{steps}.mean"], **CLOSE)
    torch.testing.assert_close(posterior.log_variance, given[f"ddpm{steps}.log_variance"], **CLOSE)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_has_no_error_and_gives_the_latents_back(prediction_type):
    diffusion = Diffusion(prediction_type, learn_sigma=False)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 8, 1, 4, 4, generator=generator)
    timesteps = torch.tensor([0, 1, 10, 250, 500, 750, 990, 999])
    target = diffusion.target(latents, noise, timesteps)
    loss = diffusion.loss(target, latents, noise, timesteps)
    assert loss.total.abs().max() == 0
    noisy = diffusion.add_noise(latents, noise, timesteps)
    recovered = diffusion.pred_latents(target, noisy, timesteps)
    torch.testing.assert_close(recovered, latents, rtol=1e-3, atol=2e-3)


def test_v_prediction_is_the_derivative_along_the_circle():
    """With signal cos(u) and noise sin(u), v is d noisy / d u (arXiv:2202.00512)."""
    diffusion = Diffusion("v_prediction", learn_sigma=False)
    latents, noise = torch.randn(2, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([400])
    angle = torch.acos(diffusion.alphas_cumprod[400].sqrt()).float().requires_grad_()
    noisy = angle.cos() * latents + angle.sin() * noise
    (first,) = torch.autograd.grad(noisy[0, 0, 0, 0], angle)
    expected = diffusion.target(latents, noise, timesteps)[0, 0, 0, 0]
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)


def test_the_variance_bound_trains_the_variance_alone():
    diffusion = Diffusion()
    latents, noise = torch.randn(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    output = torch.zeros(4, 2, 4, 4, requires_grad=True)
    bound = diffusion.loss(output, latents, noise, torch.tensor([0, 5, 500, 999])).variance_bound
    torch.autograd.backward(bound.sum())
    assert output.grad[:, 0].abs().max() == 0
    assert output.grad[:, 1].abs().min() > 0


def test_flow_moves_from_data_to_noise_in_a_straight_line():
    flow = Flow()
    latents, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    start, middle, end = (
        flow.add_noise(latents, noise, torch.full((3,), t)) for t in (0.0, 0.25, 1.0)
    )
    assert torch.equal(start, latents)
    assert torch.equal(end, noise)
    target = flow.target(latents, noise, torch.full((3,), 0.25))
    torch.testing.assert_close(middle + 0.75 * target, noise)
    assert flow.loss(target, latents, noise, torch.zeros(3)).total.abs().max() == 0
    assert flow.network_timesteps(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0, 500, 1000]


def test_kl_of_equal_normals_is_zero_and_of_others_agrees_with_torch():
    generator = torch.Generator().manual_seed(0)
    mean1, log1, mean2, log2 = torch.randn(4, 50, generator=generator)
    assert normal_kl(mean1, log1, mean1, log1).abs().max() == 0
    normals = [
        torch.distributions.Normal(m, (v / 2).exp()) for m, v in ((mean1, log1), (mean2, log2))
    ]
    expected = torch.distributions.kl_divergence(*normals)
    torch.testing.assert_close(normal_kl(mean1, log1, mean2, log2), expected, rtol=1e-4, atol=1e-5)


def test_the_bins_of_a_discretised_normal_hold_all_its_mass():
    values = torch.arange(256) / 127.5 - 1
    likelihood = discretized_log_likelihood(
        values, torch.full((256,), 0.3), torch.full((256,), -3.0)
    )
    assert likelihood.exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_the_approximate_distribution_function_is_close():
    values = torch.linspace(-6, 6, 1001)
    assert (normal_cdf(values) - torch.special.ndtr(values)).abs().max() < 3.1e-4


def test_betas_keep_the_total_noise_for_other_numbers_of_timesteps():
    thousand, hundred = Diffusion(), Diffusion(betas=linear_betas(100))
    assert hundred.log_snr[-1].item() == pytest.approx(thousand.log_snr[-1].item(), rel=0.1)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="prediction_type must be epsilon or v_prediction"):
        Diffusion("sample")
