"""The variational bound against closed forms, and against the sum over all timesteps."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from remixdit.diffusion.intervals import Intervals
from remixdit.evaluation.bits import bound_strata, prior_bits, require_bound, variational_bound
from remixdit.evaluation.held_out import HeldOut
from remixdit.evaluation.left_out import LeftOut
from remixdit.model.config import RemixConfig
from remixdit.model.model import RemixDiT
from tests.tiny import perturb, tiny_config, tiny_dit

TIMESTEPS = 24


def tiny_model(num_experts: int = 3, **changes: object) -> RemixDiT:
    """A model that is trained on nothing."""
    network = tiny_dit(learn_sigma=bool(changes.pop("learn_sigma", True)))
    model = RemixDiT.from_dit(network, 2, num_experts, num_train_timesteps=TIMESTEPS, **changes)
    perturb(model.experts, 0.5, 0)
    return model


def held(count: int = 8) -> HeldOut:
    levels = torch.randint(256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    return HeldOut(levels / 127.5 - 1, torch.arange(count) % 3)


def terms(model: RemixDiT, images: HeldOut, timestep: int, noise: Tensor) -> Tensor:
    """One term of the bound by torch.distributions, (n,) bits a dimension, in float64."""
    betas = model.process.betas
    signal = torch.cumprod(1 - betas, 0)
    before = signal[timestep - 1] if timestep else torch.ones((), dtype=torch.float64)
    x, beta, a = images.latents.double(), betas[timestep], signal[timestep]
    noisy = a.sqrt() * x + (1 - a).sqrt() * noise
    times = torch.full((len(x),), timestep)
    output = model.denoise(noisy.float(), times, images.class_labels).double()
    variance = beta * (1 - before) / (1 - a)
    if timestep == 0:
        variance = betas[1] * (1 - signal[0]) / (1 - signal[1])
    if model.process.learn_sigma:
        output, share = output.chunk(2, 1)
        share = (share + 1) / 2
        std = (share * beta.log() + (1 - share) * variance.log()).mul(0.5).exp()
    else:
        std = beta.sqrt().expand_as(x)
    clean = (noisy - (1 - a).sqrt() * output) / a.sqrt()

    def mean(of: Tensor) -> Tensor:
        return (beta * before.sqrt() * of + (1 - before) * (1 - beta).sqrt() * noisy) / (1 - a)

    if timestep:
        nats = kl_divergence(Normal(mean(x), variance.sqrt()), Normal(mean(clean), std))
    else:
        normal = Normal(mean(clean), std)
        lower = torch.where(x < -0.999, 0.0, normal.cdf(x - 1 / 255))
        upper = torch.where(x > 0.999, 1.0, normal.cdf(x + 1 / 255))
        nats = -(upper - lower).clamp_min(1e-12).log()
    return nats.flatten(1).mean(1) / math.log(2)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_the_estimate_is_the_sum_over_all_timesteps(learn_sigma):
    """Means over many draws, each by its own path; 5 standard errors of their difference."""
    model, images = tiny_model(learn_sigma=learn_sigma), held()
    generator = torch.Generator().manual_seed(0)
    whole, estimates = [], []
    for seed in range(40):
        noises = torch.randn(
            TIMESTEPS, *images.latents.shape, generator=generator, dtype=torch.float64
        )
        whole.append(sum(terms(model, images, t, noises[t]) for t in range(TIMESTEPS)).mean())
        found = variational_bound(model, images, seed=seed) - prior_bits(model, images)
        estimates.append(found.mean())
    error = math.hypot(np.std(whole), np.std(estimates)) / 40**0.5
    assert np.mean(estimates) == pytest.approx(np.mean(whole), abs=5 * error + 1e-3)
    assert error < 0.02 * np.mean(whole)


def test_a_perfect_network_needs_the_bits_of_the_last_step_alone(monkeypatch):
    """The noise and the true variance known, all divergences are 0: what is left is closed."""
    model, images = tiny_model(), held(1)
    images.latents.clamp_(-0.9, 0.9)  # the outermost levels reach to infinity

    def predict(expert, latents, timesteps, class_labels):
        signal = model.process.alphas_cumprod[timesteps].float().view(-1, 1, 1, 1)
        noise = (latents - signal.sqrt() * images.latents) / (1 - signal).sqrt()
        return torch.cat([noise, torch.full_like(noise, -1)], 1)

    monkeypatch.setattr(model, "predict", predict)
    signal, betas = model.process.alphas_cumprod, model.process.betas
    std = (betas[1] * (1 - signal[0]) / (1 - signal[1])).sqrt()
    level = math.erf(1 / 255 / float(std) / 2**0.5)  # mass of the right one of 256
    last = Normal(signal[-1].sqrt() * images.latents.double(), (1 - signal[-1]).sqrt())
    prior = kl_divergence(last, Normal(0.0, 1.0)).flatten(1).mean(1) / math.log(2)
    np.testing.assert_allclose(prior_bits(model, images), prior, rtol=1e-4)
    found = variational_bound(model, images)
    np.testing.assert_allclose(found, prior - math.log2(level), rtol=1e-3)


def test_strata_double_and_end_where_experts_do():
    strata = bound_strata(Intervals.uniform(4))
    cuts = strata.boundaries
    assert cuts == (0, 1, 2, 4, 8, 16, 32, 64, 128, 250, 256, 500, 512, 750, 1000)
    assert bound_strata(Intervals.uniform(3, 3)).boundaries == (0, 1, 2, 3)


def test_the_bound_does_not_depend_on_the_batch():
    model, images = tiny_model(), held(5)
    one = variational_bound(model, images, batch_size=1)
    np.testing.assert_allclose(variational_bound(model, images), one, rtol=1e-4)


def test_a_model_without_a_bound_says_why():
    flow = RemixDiT(
        RemixConfig(
            network=tiny_config(learn_sigma=False),
            num_bases=1,
            num_experts=1,
            prediction_type="flow_prediction",
        )
    )
    with pytest.raises(LeftOut, match="flow_prediction has no variational bound"):
        variational_bound(flow, held())
    latent = tiny_model(autoencoder={"name": "some/vae"})
    with pytest.raises(LeftOut, match="latents of an autoencoder"):
        require_bound(latent)
