"""One step: its plan, its gradients, and that nothing about how it is run changes them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from remixdit.data import Batch
from remixdit.diffusion.intervals import Intervals, LogitNormal
from remixdit.diffusion.noise import Diffusion
from remixdit.model.model import RemixDiT
from remixdit.training.config import MixtureConfig, ObjectiveConfig, TrainConfig
from remixdit.training.plan import Planner
from remixdit.training.step import Window, gradients
from remixdit.training.strata import cut_intervals, training_strata
from tests.tiny import perturb, tiny_dit


def tiny_model(mixed: str = "attention+mlp", **options: object) -> RemixDiT:
    model = RemixDiT.from_dit(tiny_dit(), 2, 5, mixed=mixed, **options)
    perturb(model.experts)
    return model


def images(batch_size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch_size, 1, 8, 8, generator=generator)
    return Batch(latents, torch.arange(batch_size) % 3, torch.arange(batch_size))


def share(batch: Batch, rank: int, num_ranks: int) -> Batch:
    rows = batch.positions.chunk(num_ranks)[rank]
    return Batch(batch.latents[rows], batch.class_labels[rows], rows)


def planner(intervals: Intervals, count: int, batch_size: int = 12, **fields: object) -> Planner:
    settings = {"seed": 0, "num_classes": 3, "label_dropout": 0.1}
    return Planner(intervals, count, batch_size, **{**settings, **fields})


def step_grads(model, count, *, micro_batch_size=0, ranks=1, dtype=torch.float32):
    """Return the gradients of a step that several processes share, and its losses."""
    plans, window = planner(model.intervals, count), Window(5, torch.device("cpu"))
    for rank in range(ranks):
        inputs = plans.inputs(3, share(images(12), rank, ranks))
        gradients(
            model,
            model.network,
            inputs,
            window,
            micro_batch_size=micro_batch_size,
            precision=dtype,
        )
    return [p.grad.clone() for p in model.network.parameters()], window


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("mixed", ["attention+mlp", "all"])
@pytest.mark.parametrize("way", [{"micro_batch_size": 5}, {"ranks": 2}, {"ranks": 3}])
def test_the_way_a_step_is_run_does_not_change_its_gradients(count, mixed, way):
    expected, whole = step_grads(tiny_model(mixed), count)
    found, window = step_grads(tiny_model(mixed), count, **way)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(window.losses, whole.losses, rtol=1e-4, atol=1e-5)
    assert whole.losses[2].sum() == 12


def test_a_bfloat16_step_is_near_the_float32_one():
    expected, _ = step_grads(tiny_model(), 5)
    found, _ = step_grads(tiny_model(), 5, dtype=torch.bfloat16)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 8e-2 * theirs.norm()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_image_belongs_to_one_of_the_steps_intervals(num_ranks):
    """Invariant 5: image i belongs to group i mod M, whichever process holds it."""
    intervals = Intervals.uniform(7)
    for step in range(10):
        plans = planner(intervals, 3)
        plan, seen = plans.plan(step), {}
        for rank in range(num_ranks):
            inputs = plans.inputs(step, share(images(12), rank, num_ranks))
            assert torch.equal(intervals.expert_at(inputs.timesteps), inputs.strata)
            for latents, stratum in zip(inputs.latents, inputs.strata.tolist(), strict=True):
                seen[int((images(12).latents == latents).flatten(1).all(1).nonzero())] = stratum
        assert [seen[i] for i in range(12)] == [plan.strata[i % 3] for i in range(12)]


def test_what_is_drawn_does_not_depend_on_the_number_of_processes():
    plans = planner(Intervals.uniform(7), 3)
    whole = plans.inputs(4, images(12))
    shares = [plans.inputs(4, share(images(12), rank, 4)) for rank in range(4)]
    for name in ("noise", "timesteps", "class_labels", "weights"):
        parts = torch.cat([getattr(inputs, name) for inputs in shares])
        order = torch.cat([inputs.latents for inputs in shares]).flatten(1)
        for latents, values in zip(whole.latents.flatten(1), getattr(whole, name), strict=True):
            place = int((order == latents).all(1).nonzero())
            assert torch.equal(parts[place], values), name


def test_a_plan_depends_on_seed_and_step_alone():
    plans = planner(Intervals.uniform(7), 3)
    torch.manual_seed(0)
    first = plans.inputs(5, images(12))
    torch.manual_seed(1)
    again = plans.inputs(5, images(12))
    assert first.plan == again.plan
    assert torch.equal(first.noise, again.noise)
    other = plans.inputs(6, images(12))
    assert not torch.equal(first.timesteps, other.timesteps)
    assert not torch.equal(first.noise, other.noise)


def test_noise_is_normal_and_timesteps_fill_their_intervals():
    plans = planner(Intervals.uniform(5), 5, batch_size=4000)
    batch = Batch(torch.zeros(4000, 1, 4, 4), torch.zeros(4000).long(), torch.arange(4000))
    inputs = plans.inputs(0, batch)
    assert abs(inputs.noise.mean()) < 0.02
    assert abs(inputs.noise.std() - 1) < 0.02
    counts = inputs.timesteps.bincount(minlength=1000)
    assert counts[:200].sum() == 800
    assert counts.view(20, 50).sum(1).float().std() < 20


def test_logit_normal_times_stay_inside_their_intervals():
    intervals = Intervals.continuous(6, LogitNormal())
    plans = planner(intervals, 6, batch_size=600)
    batch = Batch(torch.zeros(600, 1, 2, 2), torch.zeros(600).long(), torch.arange(600))
    inputs = plans.inputs(0, batch)
    assert torch.equal(intervals.expert_at(inputs.timesteps), inputs.strata)


def test_labels_are_dropped_at_the_asked_rate_and_by_seed():
    plans = planner(Intervals.uniform(5), 5, batch_size=3000)
    first, again = (plans.inputs(0, images(3000)).class_labels for _ in range(2))
    assert torch.equal(first, again)
    assert (first == 3).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_one_interval_alone_gets_all_images():
    intervals = Intervals.uniform(8)
    inputs = planner(intervals, 1, only=6).inputs(0, images(12))
    assert inputs.plan.strata == (6,)
    assert set(intervals.expert_at(inputs.timesteps).tolist()) == {6}
    assert inputs.weights.sum().item() == pytest.approx(1)


def plain_config(**objective: object) -> TrainConfig:
    return TrainConfig(
        data="",
        output_dir=Path(),
        batch_size=16,
        mixture=MixtureConfig(num_bases=1, num_experts=1),
        objective=ObjectiveConfig(**objective),
    )


def test_a_plain_dit_can_spread_its_batch_over_intervals():
    """The honest baseline: one network, timesteps stratified as the mixture's are."""
    config = plain_config(timestep_strata=8)
    model = RemixDiT.from_dit(tiny_dit(), 1, 1)
    strata = training_strata(model.config, config)
    inputs = planner(strata, config.strata_per_step, 16).inputs(0, images(16))
    assert inputs.plan.strata == tuple(range(8))
    assert strata.expert_at(inputs.timesteps).bincount().tolist() == [2] * 8
    window = Window(8, torch.device("cpu"))
    gradients(model, model.network, inputs, window)
    assert window.losses[2].tolist() == [2] * 8


def test_a_plain_dits_strata_are_the_intervals_that_its_experts_would_have():
    plain = plain_config(timestep_strata=5)
    model = RemixDiT.from_dit(tiny_dit(), 1, 1)
    strata = training_strata(model.config, plain)
    assert strata.boundaries == cut_intervals(model.config, 5, "loss").boundaries
    assert strata.boundaries != (0, 200, 400, 600, 800, 1000)
    uniform = replace(plain, mixture=replace(plain.mixture, intervals="uniform"))
    assert training_strata(model.config, uniform).boundaries == (0, 200, 400, 600, 800, 1000)
    alone = plain_config(interval="2/4")
    assert training_strata(model.config, alone).boundaries == (0, 250, 500, 750, 1000)


def test_weights_of_a_step_make_up_for_images_that_are_spread_unevenly():
    """Equal widths in log-SNR, all in every step: the expected loss is that of all timesteps."""
    intervals = Intervals.by_curve(20, Diffusion().log_snr)
    inputs = planner(intervals, 20, 40).inputs(0, images(40))
    low_noise = inputs.timesteps < 100
    assert low_noise.float().mean() > 0.3
    assert inputs.weights[low_noise].sum().item() == pytest.approx(0.1, abs=0.04)
    assert inputs.weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("mixture", "objective", "policy"),
    [
        ({}, {}, "loss"),
        ({"experts_per_step": 20}, {}, "loss"),
        ({"experts_per_step": 4}, {}, "uniform"),
        ({}, {"prediction_type": "v_prediction"}, "loss"),
        ({}, {"prediction_type": "flow_prediction"}, "loss"),
        ({"intervals": "uniform"}, {}, "uniform"),
        ({"intervals": "uniform"}, {"prediction_type": "v_prediction"}, "uniform"),
        ({"intervals": "log_snr", "experts_per_step": 1}, {}, "log_snr"),
        ({"num_bases": 1, "num_experts": 1}, {}, "uniform"),
        ({"num_bases": 1, "num_experts": 1}, {"timestep_strata": 8}, "loss"),
    ],
)
def test_intervals_are_cut_by_the_loss_where_that_was_seen_to_pay(mixture, objective, policy):
    config = TrainConfig(
        data="",
        output_dir=Path(),
        mixture=MixtureConfig(**mixture),
        objective=ObjectiveConfig(**objective),
    )
    assert config.interval_policy == policy


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ObjectiveConfig(interval="8/8"), "interval must be n/N with n in"),
        (lambda: ObjectiveConfig(interval="one"), "interval must be n/N with n in"),
        (lambda: ObjectiveConfig(interval="0/8", timestep_strata=8), "timestep_strata must be 0"),
        (
            lambda: MixtureConfig(coefficients="one_hot", experts_per_step=3),
            "experts_per_step must be 0, for all, with one_hot coefficients, got 3",
        ),
        (
            lambda: TrainConfig(
                data="", output_dir=Path(), objective=ObjectiveConfig(interval="0/8")
            ),
            "interval must be that of a plain DiT, got 20 experts",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
