"""Trajectories against the published samplers, and what must not change an image."""

import numpy as np
import pytest
import torch

from remixdit.data.autoencoder import Pixels
from remixdit.diffusion.noise import Diffusion, Flow
from remixdit.model.config import RemixConfig
from remixdit.model.model import RemixDiT
from remixdit.sampling.moments import moments
from remixdit.sampling.sampler import (
    SamplingConfig,
    denoising_steps,
    guided_output,
    sample,
    sample_latents,
    spaced_timesteps,
    trajectory_of,
)
from tests.tiny import perturb, published_dit, tiny_config, tiny_dit


def published_model(given, settings) -> RemixDiT:
    return RemixDiT.from_dit(published_dit(given, settings), num_bases=1, num_experts=1)


def tiny_model(num_bases: int = 2, num_experts: int = 5, **options: object) -> RemixDiT:
    model = RemixDiT.from_dit(tiny_dit(), num_bases, num_experts, **options)
    perturb(model.experts, 0.5, 0)
    return model


@pytest.mark.parametrize("steps", [10, 25])
def test_timesteps_are_spaced_as_published(steps, settings):
    assert spaced_timesteps(steps).tolist() == settings[f"ddim{steps}.timesteps"]


@pytest.mark.parametrize("steps", [10, 25])
def test_ddim_equals_the_published_sampler(steps, given, settings):
    model = published_model(given, settings)
    trajectory = trajectory_of(model, SamplingConfig(scheduler="ddim", num_inference_steps=steps))
    latents = given["dit.latents"]
    for number, timestep in enumerate(trajectory.timesteps.tolist()):
        times = torch.full((len(latents),), timestep)
        output = model.denoise(latents, times, given["dit.class_labels"])
        latents = trajectory.step(output, number, latents, [])
    # Untrained weights: values reach 560, so 1e-4 is their rounding.
    torch.testing.assert_close(latents, given[f"ddim{steps}.output"], rtol=1e-4, atol=1e-4)


def test_guidance_on_three_channels_equals_the_published_slip(given, settings):
    model = published_model(given, settings)
    config = SamplingConfig(guidance_scale=4.0, guidance_channels=3)
    half = len(given["cfg.output"])
    for row in range(half):
        rows = slice(row, row + 1)
        timestep = given["dit.timesteps"][row].item()
        output = guided_output(
            model, config, 0, given["dit.latents"][rows], timestep, given["dit.class_labels"][rows]
        )
        torch.testing.assert_close(output, given["cfg.output"][rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpm++"])
def test_an_image_depends_on_seed_and_index_alone(scheduler):
    model = tiny_model()
    config = SamplingConfig(num_images=5, num_inference_steps=6, scheduler=scheduler, seed=3)
    whole = sample_latents(model, config, range(5))
    single = torch.cat([sample_latents(model, config, [index]) for index in (4, 0, 2)])
    torch.testing.assert_close(single, whole[[4, 0, 2]], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole[0], whole[3])  # the same label, another image


def test_processes_share_out_the_images():
    model = tiny_model()
    config = SamplingConfig(num_images=7, num_inference_steps=3, batch_size=2)
    alone = [s.indices for s in sample(model, Pixels(), config)]
    shared = [s.indices for rank in range(2) for s in sample(model, Pixels(), config, rank, 2)]
    assert sorted(alone) == sorted(shared)
    assert [index for batch in alone for index in batch] == list(range(7))


def test_a_trajectory_mixes_each_expert_at_most_once(monkeypatch):
    model = tiny_model()
    switch, mixes = model.switch(), []
    original = switch._write
    monkeypatch.setattr(
        switch, "_write", lambda *args, **kw: (mixes.append(1), original(*args, **kw))
    )
    sample_latents(model, SamplingConfig(num_images=2, num_inference_steps=50), range(2))
    assert len(mixes) == model.num_experts


def test_precomputed_experts_give_identical_images():
    config = {"num_images": 3, "num_inference_steps": 10}
    mixed = sample_latents(tiny_model(), SamplingConfig(**config), range(3))
    ready = sample_latents(tiny_model(), SamplingConfig(**config, precompute=True), range(3))
    assert torch.equal(mixed, ready)


def test_guidance_outside_its_interval_costs_nothing_and_changes_nothing():
    model = tiny_model()
    plain = SamplingConfig(num_images=2, num_inference_steps=4)
    never = SamplingConfig(
        num_images=2, num_inference_steps=4, guidance_scale=3.0, guidance_interval=(0.0005, 0.0006)
    )
    always = SamplingConfig(num_images=2, num_inference_steps=4, guidance_scale=3.0)
    without = sample_latents(model, plain, range(2))
    assert torch.equal(without, sample_latents(model, never, range(2)))
    assert not torch.allclose(without, sample_latents(model, always, range(2)))


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
def test_schedulers_find_the_data_of_a_perfect_network(scheduler, monkeypatch):
    """A network that always sees through the noise to one image must arrive there."""
    model = tiny_model()
    truth = torch.rand(1, 1, 8, 8) * 2 - 1

    def oracle(expert, latents, timesteps, class_labels):
        signal = model.process.alphas_cumprod[timesteps].float().view(-1, 1, 1, 1)
        noise = (latents - signal.sqrt() * truth) / (1 - signal).sqrt()
        return torch.cat([noise, torch.zeros_like(noise)], dim=1)

    monkeypatch.setattr(model, "predict", oracle)
    config = SamplingConfig(num_images=2, scheduler=scheduler, num_inference_steps=20)
    torch.testing.assert_close(
        sample_latents(model, config, range(2)), truth.expand(2, -1, -1, -1), rtol=1e-3, atol=1e-3
    )


def test_euler_follows_a_straight_flow_to_the_data(monkeypatch):
    config = RemixConfig(
        network=tiny_config(learn_sigma=False),
        num_bases=1,
        num_experts=1,
        prediction_type="flow_prediction",
    )
    model = RemixDiT(config)
    truth = torch.rand(1, 1, 8, 8)

    def velocity(expert, latents, timesteps, class_labels):
        return (latents - truth) / timesteps.view(-1, 1, 1, 1)

    monkeypatch.setattr(model, "predict", velocity)
    latents = sample_latents(model, SamplingConfig(num_images=2, num_inference_steps=7), range(2))
    torch.testing.assert_close(latents, truth.expand(2, -1, -1, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpm++", "euler"])
def test_the_last_predicted_image_is_the_finished_one(scheduler):
    flow = {"prediction_type": "flow_prediction"} if scheduler == "euler" else {}
    model = RemixDiT.from_dit(tiny_dit(learn_sigma=not flow), 2, 5, **flow)
    config = SamplingConfig(num_images=2, num_inference_steps=6, scheduler=scheduler)
    *_, last = denoising_steps(model, config, range(2))
    torch.testing.assert_close(last.pred_latents, last.latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("process", [Diffusion("epsilon"), Diffusion("v_prediction"), Flow()])
def test_a_perfect_prediction_implies_the_clean_latents(process):
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.1, 0.5, 0.9])
    if isinstance(process, Diffusion):
        times = (1000 * times).long()
    noisy, target = (make(latents, noise, times) for make in (process.add_noise, process.target))
    implied = process.pred_latents(target, noisy, times)
    torch.testing.assert_close(implied, latents, rtol=1e-3, atol=1e-4)


def test_moments_are_predicted_until_the_last_which_is_the_sample():
    model = tiny_model()
    config = SamplingConfig(num_images=2, num_inference_steps=9, seed=3)
    seen = list(moments(model, Pixels(), config, 4, predicted=True))
    assert [moment.step for moment in seen] == [1, 4, 6, 9]
    assert [moment.expert for moment in seen] == [4, 3, 1, 0]
    assert np.array_equal(seen[-1].images, next(sample(model, Pixels(), config)).images)


def test_labels_cycle_over_those_asked_for_or_over_all_classes():
    model = tiny_model()
    every = next(sample(model, Pixels(), SamplingConfig(num_images=5, num_inference_steps=1)))
    assert every.class_labels.tolist() == [0, 1, 2, 0, 1]
    asked = SamplingConfig(num_images=5, num_inference_steps=1, class_labels=(2, 0))
    assert next(sample(model, Pixels(), asked)).class_labels.tolist() == [2, 0, 2, 0, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guidance_scale": 0.5}, "guidance_scale must be at least 1, got 0.5"),
        ({"scheduler": "euler"}, "scheduler must be one of ddpm, ddim, dpm"),
        ({"class_labels": (3,)}, r"class_labels must be in \[0, 3\), got 3"),
        ({"num_inference_steps": 1001}, "num_inference_steps must be at most 1000, got 1001"),
        ({"num_images": 0}, "num_images must be at least 1, got 0"),
        ({"guidance_interval": (0.7, 0.2)}, "guidance_interval must rise"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        sample_latents(tiny_model(), SamplingConfig(**{"num_inference_steps": 2, **fields}), [0])
