"""Every timestep has one owner, and draws follow the masses."""

import math

import pytest
import torch

from remixdit.diffusion.intervals import Intervals, LogitNormal
from remixdit.diffusion.noise import Diffusion, Flow
from remixdit.seeds import generator_for


@pytest.mark.parametrize("total", [1, 7, 999, 1000])
def test_every_timestep_belongs_to_exactly_one_expert_for_every_number_of_experts(total):
    timesteps = torch.arange(total)
    for num_experts in range(1, total + 1):
        intervals = Intervals.uniform(num_experts, total)
        owners = intervals.expert_at(timesteps)
        assert torch.equal(owners.unique(), torch.arange(num_experts))
        assert bool((owners.diff() >= 0).all())
        expected = [n * total // num_experts for n in range(num_experts + 1)]
        assert list(intervals.boundaries) == expected


@pytest.mark.parametrize("num_experts", [1, 2, 20, 333, 999, 1000])
def test_log_snr_intervals_are_never_empty_and_equal_in_width_where_they_can_be(num_experts):
    log_snr = Diffusion().log_snr
    intervals = Intervals.by_curve(num_experts, log_snr)
    assert torch.equal(intervals.expert_at(torch.arange(1000)).unique(), torch.arange(num_experts))
    if num_experts == 20:
        levels = log_snr[torch.tensor(intervals.boundaries[1:-1])]
        widths = -levels.diff()
        # At the noisy end a timestep is small against an interval.
        assert widths[8:].std() < 0.05 * widths[8:].mean()


def test_flow_intervals_by_log_snr_are_equal_in_width():
    intervals = Intervals.continuous_by_curve(8, Flow.log_snr)
    inner = torch.tensor(intervals.boundaries[1:-1], dtype=torch.float64)
    widths = -Flow.log_snr(inner).diff()
    torch.testing.assert_close(widths, widths.mean().expand(6), rtol=1e-3, atol=0)


def test_the_last_expert_owns_pure_noise_and_fractions_belong_where_their_floor_does():
    continuous = Intervals.continuous(4)
    assert continuous.expert_at(torch.tensor([0.0, 0.25, 0.999, 1.0])).tolist() == [0, 1, 3, 3]
    discrete = Intervals.uniform(4, 1000)
    assert discrete.expert_at(torch.tensor([249.0, 249.9, 250.0])).tolist() == [0, 0, 1]


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_timesteps_outside_are_refused(timestep):
    with pytest.raises(ValueError, match=rf"timesteps must be in \[0, 1000\), got {timestep}"):
        Intervals.uniform(4).expert_at(torch.tensor([0, timestep]))


@pytest.mark.parametrize("num_experts", [0, -3, 1001])
def test_numbers_of_experts_that_cannot_be_are_refused(num_experts):
    with pytest.raises(ValueError, match=f"num_experts must be at .*, got {num_experts}"):
        Intervals.uniform(num_experts)


@pytest.mark.parametrize("boundaries", [(0,), (1, 10), (0, 5, 5, 10), (0.0, 0.5, 0.9)])
def test_boundaries_with_gaps_are_refused(boundaries):
    with pytest.raises(ValueError, match="boundaries must"):
        Intervals(boundaries)


def test_draws_depend_on_seed_and_step_alone():
    intervals = Intervals.uniform(20)
    torch.manual_seed(0)
    first = [intervals.draw_experts(3, 1, step) for step in range(20)]
    torch.manual_seed(1)
    assert first == [intervals.draw_experts(3, 1, step) for step in range(20)]
    assert first != [intervals.draw_experts(3, 2, step) for step in range(20)]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(
    "boundaries", [(0, 200, 400, 600, 800, 1000), (0, 10, 300, 400, 900, 1000)]
)
def test_weighted_draws_have_the_expectation_of_independent_timesteps(boundaries, count):
    """The mean of weight[n] over steps must be the mass of n, for any M."""
    intervals, steps = Intervals(boundaries), 4000
    totals = torch.zeros(5, dtype=torch.float64)
    for step in range(steps):
        draw = intervals.draw_experts(count, 0, step)
        assert len(set(draw.experts)) == count
        totals[list(draw.experts)] += torch.tensor(draw.weights, dtype=torch.float64)
    masses = torch.tensor(intervals.masses, dtype=torch.float64)
    error = (totals / steps - masses).abs()
    assert bool((error < 4 * (masses / steps).sqrt()).all()), (totals / steps, masses)


def test_equal_masses_have_equal_weights():
    draw = Intervals.uniform(20).draw_experts(4, 0, 0)
    assert draw.weights == pytest.approx([0.25] * 4)


def test_more_experts_than_there_are_cannot_be_drawn():
    with pytest.raises(ValueError, match=r"experts_per_step must be in 1\.\.4, got 5"):
        Intervals.uniform(4).draw_experts(5, 0, 0)


@pytest.mark.parametrize("num_experts", [1, 3, 7])
def test_timesteps_are_uniform_inside_their_interval(num_experts):
    intervals = Intervals.uniform(num_experts, 50)
    for expert in range(num_experts):
        drawn = intervals.draw_timesteps(expert, 20_000, generator_for(0, expert))
        assert intervals.expert_at(drawn).unique().tolist() == [expert]
        counts = drawn.bincount(minlength=50)[intervals.boundaries[expert] :]
        counts = counts[: intervals.boundaries[expert + 1] - intervals.boundaries[expert]]
        expected = 20_000 / len(counts)
        assert bool(((counts - expected).abs() < 5 * math.sqrt(expected)).all())


def test_logit_normal_masses_equal_the_share_of_draws():
    distribution = LogitNormal(0.5, 0.8)
    grid = torch.linspace(0.05, 0.95, 20_001, dtype=torch.float64)
    within = torch.trapezoid(distribution.density(grid), grid).item()
    assert within == pytest.approx(distribution.cdf(0.95) - distribution.cdf(0.05), rel=1e-6)
    intervals = Intervals((0.0, 0.3, 0.6, 1.0), distribution)
    generator = generator_for(0, "normal")
    times = torch.sigmoid(0.5 + 0.8 * torch.randn(100_000, generator=generator))
    shares = intervals.expert_at(times).bincount() / 100_000
    torch.testing.assert_close(shares, torch.tensor(intervals.masses), rtol=0, atol=0.006)


def test_logit_normal_draws_inside_an_interval_follow_the_density():
    intervals = Intervals.continuous(4, LogitNormal())
    generator = generator_for(0, "inside")
    drawn = intervals.draw_timesteps(1, 50_000, generator)
    assert intervals.expert_at(drawn).unique().tolist() == [1]
    whole = torch.sigmoid(torch.randn(400_000, generator=generator))
    reference = whole[(whole >= 0.25) & (whole < 0.5)]
    assert drawn.mean() == pytest.approx(reference.mean().item(), abs=2e-3)
    assert drawn.std() == pytest.approx(reference.std().item(), abs=2e-3)
