"""One step: its plan, its gradients, and that nothing about how it is run changes them."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from remixdit.data import Batch
from remixdit.diffusion.intervals import Intervals
from remixdit.diffusion.noise import Diffusion
from remixdit.first.optim import MixtureAdamW, OptimizerConfig
from remixdit.first.stacking import ExpertStack, Order
from remixdit.first.step_gradients import StepGradients
from remixdit.model.model import RemixDiT
from remixdit.training.config import MixtureConfig, ObjectiveConfig, TrainConfig
from remixdit.training.start import training_strata
from remixdit.training.step import Window, plan_step, step_inputs, train_step
from tests.tiny import tiny_dit


def config_for(batch_size: int = 12, **fields: object) -> TrainConfig:
    mixture = MixtureConfig(**{"num_bases": 2, "num_experts": 5, **fields})
    return TrainConfig(data="", output_dir=Path(), batch_size=batch_size, mixture=mixture)


def tiny_model(mixed: str = "attention+mlp") -> RemixDiT:
    model = RemixDiT.from_dit(tiny_dit(), 2, 5, mixed=mixed)
    model.mixture.perturb(0.5, torch.Generator().manual_seed(0))
    return model


def images(batch_size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch_size, 1, 8, 8, generator=generator)
    return Batch(latents, torch.arange(batch_size) % 3, torch.arange(batch_size))


def share(batch: Batch, rank: int, num_ranks: int) -> Batch:
    rows = batch.positions.chunk(num_ranks)[rank]
    return Batch(batch.latents[rows], batch.class_labels[rows], rows)


def step_grads(model, batch, config, *, stacked=False, micro_batch_size=0, ranks=1):
    """Return what all processes together would hand to the optimizer."""
    strata = training_strata(model, config)
    plan = plan_step(strata, config.strata_per_step, config.batch_size, 0, 3)
    window = Window(strata.num_experts, torch.device("cpu"))
    gradients = StepGradients(model.mixture)
    stack = ExpertStack(gradients, config.strata_per_step) if stacked else None
    sums: list[torch.Tensor] = []
    for rank in range(ranks):
        inputs = step_inputs(model, share(batch, rank, ranks), plan, config)
        train_step(model, gradients, inputs, plan, window, stack, micro_batch_size)
        grads = []
        for segment in model.mixture.segments:
            grads.append(gradients.basis_weights(segment).t() @ segment.grads)
        grads += [dots for _, dots in gradients.coefficient_grads()]
        sums = [a + b for a, b in zip(sums, grads, strict=True)] if sums else grads
    return sums, window


@pytest.mark.parametrize("experts_per_step", [1, 2, 3, 5])
@pytest.mark.parametrize("mixed", ["attention+mlp", "all"])
@pytest.mark.parametrize(
    "way", [{"stacked": True}, {"micro_batch_size": 2}, {"ranks": 2}, {"ranks": 3, "stacked": True}]
)
def test_the_way_a_step_is_run_does_not_change_its_gradients(experts_per_step, mixed, way):
    if experts_per_step == 1 and way.get("stacked"):
        pytest.skip("one expert needs no stack")
    config = config_for(experts_per_step=experts_per_step)
    expected, whole = step_grads(tiny_model(mixed), images(12), config)
    found, window = step_grads(tiny_model(mixed), images(12), config, **way)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(window.losses, whole.losses, rtol=1e-4, atol=1e-5)
    assert whole.losses[2].sum() == 12


def test_clipping_sees_the_same_norm_however_raw_coefficients_are_run():
    norms = []
    for micro_batch_size, stacked in ((0, False), (0, True), (2, False)):
        model = RemixDiT.from_dit(tiny_dit(), 2, 5, coefficients="raw")
        model.mixture.perturb(0.5, torch.Generator().manual_seed(0))
        with torch.no_grad():
            model.mixture.logits.mul_(torch.rand(5, 1, generator=torch.Generator().manual_seed(1)))
        step_grads(
            model, images(12), config_for(), stacked=stacked, micro_batch_size=micro_batch_size
        )
        norms.append(MixtureAdamW(model.mixture, OptimizerConfig())._grad_norm())
    torch.testing.assert_close(norms[1], norms[0])
    torch.testing.assert_close(norms[2], norms[0])


def test_a_stacked_bfloat16_step_is_near_the_float32_one():
    config = config_for()
    expected, _ = step_grads(tiny_model(), images(12), config)
    model = tiny_model()
    model.mixture.cast_network(torch.bfloat16)
    window = Window(5, torch.device("cpu"))
    plan = plan_step(model.intervals, 5, 12, 0, 3)
    inputs = step_inputs(model, images(12), plan, config)
    gradients = StepGradients(model.mixture)
    train_step(model, gradients, inputs, plan, window, ExpertStack(gradients, 5))
    for segment, theirs in zip(model.mixture.segments, expected, strict=False):
        ours = gradients.basis_weights(segment).t() @ segment.grads.float()
        assert (ours - theirs).norm() < 5e-2 * theirs.norm()


def test_a_parameter_without_gradient_in_a_stacked_step_has_one_of_0():
    model = tiny_model()
    gradients = StepGradients(model.mixture)
    segment = next(s for s in model.mixture.segments if s.is_mixed)
    for places in (range(len(segment.shapes)), [0]):  # the second step finds what the first left
        gradients.begin_stacked_step(range(5))
        for place in places:
            grads = torch.ones(5, *segment.shapes[place])
            gradients.collect_stacked(segment, place, grads)
        segment.clear_rest()
    first, *others = (segment.part(segment.grads, place) for place in range(len(segment.shapes)))
    assert first.all()
    assert not any(part.any() for part in others)


def test_a_stack_is_freed_with_its_mixture():
    model = tiny_model()
    stack = ExpertStack(StepGradients(model.mixture), 5)
    alive = [weakref.ref(values) for values in (stack.leaves[0][0], model.mixture)]
    del stack, model
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


@pytest.mark.parametrize("stacked", [True, False])
def test_what_trains_is_what_is_kept(stacked):
    """A bfloat16 network must follow its float32 masters, shared parameters among them."""
    model, config = tiny_model(), config_for()
    optimizer = MixtureAdamW(model.mixture, OptimizerConfig(learning_rate=0.1))
    model.mixture.cast_network(torch.bfloat16)
    stack = ExpertStack(optimizer.gradients, 5) if stacked else None
    for step in range(3):
        plan = plan_step(model.intervals, 5, 12, 0, step)
        window = Window(5, torch.device("cpu"))
        inputs = step_inputs(model, images(12), plan, config)
        train_step(model, optimizer.gradients, inputs, plan, window, stack)
        for segment in model.mixture.segments:
            if not segment.is_mixed:
                assert torch.equal(segment.weights, segment.bases[0].to(segment.weights.dtype))
        optimizer.step(step, 3)


def test_every_image_belongs_to_one_of_the_steps_intervals():
    intervals = Intervals.uniform(7)
    for step in range(20):
        plan = plan_step(intervals, 3, 11, 0, step)
        owners = intervals.expert_at(plan.timesteps)
        assert owners.tolist() == [plan.strata[i % 3] for i in range(11)]
        assert plan.weights.sum().item() == pytest.approx(1, rel=0.01)


def test_a_plan_depends_on_seed_and_step_alone():
    intervals = Intervals.uniform(7)
    torch.manual_seed(0)
    first = plan_step(intervals, 3, 11, 0, 5)
    torch.manual_seed(1)
    again = plan_step(intervals, 3, 11, 0, 5)
    assert first.strata == again.strata
    assert torch.equal(first.timesteps, again.timesteps)
    other = plan_step(intervals, 3, 11, 0, 6)
    assert not torch.equal(first.timesteps, other.timesteps)


def test_a_plain_dit_can_spread_its_batch_over_intervals():
    """The honest baseline: one network, timesteps stratified as the mixture's are."""
    config = TrainConfig(
        data="",
        output_dir=Path(),
        batch_size=16,
        mixture=MixtureConfig(num_bases=1, num_experts=1),
        objective=ObjectiveConfig(timestep_strata=8),
    )
    model = RemixDiT.from_dit(tiny_dit(), 1, 1)
    strata = training_strata(model, config)
    plan = plan_step(strata, config.strata_per_step, 16, 0, 0)
    assert plan.strata == tuple(range(8))
    assert strata.expert_at(plan.timesteps).bincount().tolist() == [2] * 8
    window = Window(8, torch.device("cpu"))
    optimizer = MixtureAdamW(model.mixture, OptimizerConfig())
    inputs = step_inputs(model, images(16), plan, config)
    train_step(model, optimizer.gradients, inputs, plan, window)
    assert window.losses[2].tolist() == [2] * 8
    optimizer.step(0, 1)


def test_a_plain_dits_strata_are_the_intervals_that_its_experts_would_have():
    plain = config_for(num_bases=1, num_experts=1)
    plain = replace(plain, objective=ObjectiveConfig(timestep_strata=5))
    model = RemixDiT.from_dit(tiny_dit(), 1, 1)
    strata = training_strata(model, plain)
    assert strata.boundaries == Intervals.by_log_snr(5, Diffusion().log_snr).boundaries
    uniform = replace(plain, mixture=replace(plain.mixture, intervals="uniform"))
    assert training_strata(model, uniform).boundaries == (0, 200, 400, 600, 800, 1000)


def test_weights_of_a_step_make_up_for_images_that_are_spread_unevenly():
    """Equal widths in log-SNR, all in every step: the expected loss is that of all timesteps."""
    intervals = Intervals.by_log_snr(20, Diffusion().log_snr)
    plan = plan_step(intervals, 20, 40, 0, 0)
    low_noise = plan.timesteps < 100
    assert low_noise.float().mean() > 0.3
    assert plan.weights[low_noise].sum().item() == pytest.approx(0.1, abs=0.04)
    assert plan.weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("mixture", "objective", "policy"),
    [
        ({}, {}, "log_snr"),
        ({"experts_per_step": 20}, {}, "log_snr"),
        ({"experts_per_step": 4}, {}, "uniform"),
        ({}, {"prediction_type": "v_prediction"}, "uniform"),
        ({"intervals": "uniform"}, {}, "uniform"),
        ({"intervals": "log_snr", "experts_per_step": 1}, {}, "log_snr"),
        ({"num_bases": 1, "num_experts": 1}, {}, "uniform"),
        ({"num_bases": 1, "num_experts": 1}, {"timestep_strata": 8}, "log_snr"),
    ],
)
def test_intervals_are_cut_in_log_snr_where_that_was_seen_to_pay(mixture, objective, policy):
    config = TrainConfig(
        data="",
        output_dir=Path(),
        mixture=MixtureConfig(**mixture),
        objective=ObjectiveConfig(**objective),
    )
    assert config.interval_policy == policy


def test_labels_are_dropped_at_the_asked_rate_and_by_seed():
    model = tiny_model()
    config = config_for(batch_size=3000)
    plan = plan_step(model.intervals, 5, 3000, 0, 0)
    first, again = (step_inputs(model, images(3000), plan, config).class_labels for _ in range(2))
    assert torch.equal(first, again)
    assert (first == 3).float().mean().item() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(("first", "count", "num_experts"), [(0, 12, 5), (7, 11, 4), (3, 2, 5)])
def test_sorted_images_belong_to_the_experts_of_their_places(first, count, num_experts):
    order = Order.of(first, count, num_experts, torch.device("cpu"))
    assert sorted(order.rows.tolist()) == list(range(count))
    assert torch.equal(order.experts, (first + order.rows) % num_experts)
