"""Thresholding against diffusers' and the equations, and what it must not change."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from remixdit.diffusion.noise import Diffusion, Flow
from remixdit.model.model import RemixDiT
from remixdit.sampling.sampler import (
    SamplingConfig,
    denoising_steps,
    sample_latents,
    spaced_timesteps,
)
from remixdit.sampling.thresholding import clipped, thresholded
from remixdit.seeds import generator_for
from tests.tiny import tiny_dit

SAMPLERS = ["ddpm", "ddim", "dpm++", "euler"]
KINDS = ["static", "dynamic"]
IMAGES, STEPS, SEED = 3, 7, 5


def model_of(scheduler: str = "ddim", prediction: str = "epsilon") -> RemixDiT:
    """A model whose predictions leave the range, since it is untrained."""
    kind = "flow_prediction" if scheduler == "euler" else prediction
    model = RemixDiT.from_dit(tiny_dit(learn_sigma=False), 2, 5, prediction_type=kind)
    with torch.no_grad():
        model.network.final_layer.linear.weight.mul_(4)
    return model


def config_of(scheduler: str = "ddim", kind: str = "static", **changes) -> SamplingConfig:
    fields = {"num_images": IMAGES, "num_inference_steps": STEPS, "seed": SEED}
    return SamplingConfig(scheduler=scheduler, thresholding=kind, **{**fields, **changes})


def first_noise() -> tuple[torch.Tensor, list[torch.Generator]]:
    generators = [generator_for(SEED, "sample", index) for index in range(IMAGES)]
    return torch.stack([torch.randn(1, 8, 8, generator=g) for g in generators]), generators


def output_of(model: RemixDiT, noisy: torch.Tensor, timestep: int) -> torch.Tensor:
    times = torch.full((len(noisy),), timestep)
    return model.denoise(noisy, times, torch.arange(len(noisy)) % 3)


def clipped_by_numpy(image: torch.Tensor, kind: str) -> torch.Tensor:
    """Imagen's equation, or DDPM's, image by image."""
    if kind == "static":
        return torch.from_numpy(np.clip(image.numpy(), -1, 1))
    rows = []
    for one in image.numpy():
        scale = max(1.0, np.percentile(np.abs(one), 99.5))
        rows.append(np.clip(one, -scale, scale) / scale)
    return torch.from_numpy(np.stack(rows)).float()


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_follows_the_published_equation(kind):
    sizes = torch.tensor([0.2, 1.0, 3.0, 100.0]).view(-1, 1, 1, 1)
    image = sizes * torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(clipped(image, kind), clipped_by_numpy(image, kind))


def test_dynamic_is_static_where_few_pixels_are_outside():
    image = torch.linspace(-0.9, 0.9, 3 * 16 * 16).view(1, 3, 16, 16)
    image[0, 0, 0, :3] = torch.tensor([7.0, -2.0, 1.5])  # 3 of 768: below 0.5 %
    assert torch.equal(clipped(image, "dynamic"), clipped(image, "static"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("process", [Diffusion("epsilon"), Diffusion("v_prediction"), Flow()])
def test_the_prediction_implies_the_clipped_image(process, kind):
    noisy, prediction = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.001, 0.5, 1.0])
    if isinstance(process, Diffusion):
        times = torch.tensor([0, 500, 999])
    changed, image = thresholded(kind, process, 3 * prediction, noisy, times)
    assert image.abs().max() <= 1
    implied = process.pred_latents(changed, noisy, times)
    torch.testing.assert_close(implied, image, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_predictions_inside_the_range_are_left_alone_bit_for_bit(scheduler, kind, monkeypatch):
    """A network that sees through the noise to one image predicts no other."""
    model = model_of(scheduler)
    truth = torch.rand(1, 1, 8, 8) * 1.8 - 0.9

    def oracle(expert, noisy, timesteps, class_labels):
        image = truth.expand(len(noisy), -1, -1, -1)
        return model.process.target(
            image, model.process.pred_noise(image, noisy, timesteps), timesteps
        )

    monkeypatch.setattr(model, "predict", oracle)
    drawn = [sample_latents(model, config_of(scheduler, k), range(2)) for k in ("none", kind)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_recomputes_epsilon_from_the_clipped_image(prediction, kind):
    model = model_of(prediction=prediction)
    signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    timesteps = spaced_timesteps(STEPS).flip(0).tolist()
    x, _ = first_noise()
    largest = []
    for t, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        a, b = signal[t], torch.tensor(1.0) if after is None else signal[after]
        output, x = output_of(model, x, t).double(), x.double()
        image = a.sqrt() * x - (1 - a).sqrt() * output
        if prediction == "epsilon":
            image = (x - (1 - a).sqrt() * output) / a.sqrt()
        largest.append(image.abs().max())
        image = clipped_by_numpy(image, kind)
        noise = (x - a.sqrt() * image) / (1 - a).sqrt()
        x = (b.sqrt() * image + (1 - b).sqrt() * noise).float()
    assert min(largest) > 1  # clipped at every step
    drawn = sample_latents(model, config_of(kind=kind), range(IMAGES))
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_ddpm_takes_the_mean_of_the_clipped_image(kind):
    model = model_of()
    spaced = spaced_timesteps(STEPS)
    signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[spaced]
    before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
    betas = 1 - signal / before
    x, generators = first_noise()
    for i in reversed(range(STEPS)):
        output = output_of(model, x, int(spaced[i])).double()
        image = (x.double() - (1 - signal[i]).sqrt() * output) / signal[i].sqrt()
        image = clipped_by_numpy(image, kind)
        # Equation 7 of arXiv:2006.11239, with the fixed variance beta.
        mean = before[i].sqrt() * betas[i] / (1 - signal[i]) * image
        mean = mean + (1 - betas[i]).sqrt() * (1 - before[i]) / (1 - signal[i]) * x
        noise = torch.stack([torch.randn(1, 8, 8, generator=g) for g in generators]) if i else 0
        x = (mean + betas[i].sqrt() * noise).float()
    drawn = sample_latents(model, config_of("ddpm", kind), range(IMAGES))
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_samplers_agree_with_thresholding_of_diffusers(name, kind):
    model = model_of()
    spaced = spaced_timesteps(STEPS)
    # By default sample_max_value is 1, which makes diffusers' dynamic thresholding static.
    largest = 1.0 if kind == "static" else 1e6
    made, extra = DPMSolverMultistepScheduler, {}
    if name == "ddim":
        made, extra = DDIMScheduler, {"use_clipped_model_output": True}
    scheduler = made(
        num_train_timesteps=STEPS,
        trained_betas=model.process.respaced(spaced).betas.numpy(),
        timestep_spacing="trailing",
        thresholding=True,
        sample_max_value=largest,
    )
    scheduler.set_timesteps(STEPS)
    x, _ = first_noise()
    for timestep, index in zip(spaced.flip(0).tolist(), scheduler.timesteps, strict=True):
        x = scheduler.step(output_of(model, x, timestep), index, x, **extra)["prev_sample"]
    drawn = sample_latents(model, config_of(name, kind), range(IMAGES))
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_finished_and_predicted_images_are_within_the_range(scheduler, kind):
    model = model_of(scheduler)
    free = sample_latents(model, config_of(scheduler, "none"), range(IMAGES))
    assert free.abs().max() > 1.1
    for step in denoising_steps(model, config_of(scheduler, kind), range(IMAGES)):
        assert step.pred_latents.abs().max() <= 1
    assert step.latents.abs().max() <= 1 + 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_the_batch_size_does_not_change_clipped_images(scheduler, kind):
    model, config = model_of(scheduler), config_of(scheduler, kind)
    whole = sample_latents(model, config, range(IMAGES))
    single = torch.cat([sample_latents(model, config, [index]) for index in (2, 0)])
    torch.testing.assert_close(single, whole[[2, 0]], rtol=1e-4, atol=1e-5)


def test_learned_variances_are_kept():
    model = RemixDiT.from_dit(tiny_dit(), 2, 5)
    drawn = sample_latents(model, config_of("ddpm", guidance_scale=2.0), range(IMAGES))
    assert drawn.abs().max() <= 1 + 1e-5


@pytest.mark.parametrize("autoencoder", ["none", "stabilityai/sd-vae-ft-ema"])
def test_thresholding_of_latents_is_refused(autoencoder):
    network = tiny_dit(in_channels=4)
    model = RemixDiT.from_dit(network, 2, 5, autoencoder={"name": autoencoder})
    with pytest.raises(ValueError, match=r"thresholding must be none for a model of latents.*dyna"):
        sample_latents(model, config_of(kind="dynamic"), [0])


def test_unknown_thresholding_is_refused():
    with pytest.raises(ValueError, match=r"thresholding must be one of none, static.*got 'clip'"):
        SamplingConfig(thresholding="clip")


def test_the_title_of_a_picture_names_thresholding():
    model = model_of()
    assert config_of(kind="none").summary(model) == "7 steps of ddim, no guidance, seed 5"
    text = "7 steps of ddim, no guidance, static thresholding, seed 5"
    assert config_of(kind="static").summary(model) == text
