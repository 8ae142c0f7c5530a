"""The loss of the best linear denoiser, against denoisers that are computed otherwise."""

import pytest
import torch

from remixdit.diffusion.expected_loss import (
    LOG_SNR_SHARE,
    expected_losses,
    gradient_curve,
    natural_power,
)
from remixdit.diffusion.intervals import Intervals, LogitNormal
from remixdit.diffusion.noise import Diffusion, Flow

PROCESSES = {
    "epsilon": Diffusion("epsilon", learn_sigma=False),
    "v": Diffusion("v_prediction", learn_sigma=False),
    "flow": Flow(),
}
TIMES = torch.tensor([3, 200, 800])


def at(process, times):
    """Return the three times as the process counts them."""
    return times if isinstance(process, Diffusion) else times.double() / 1000


@pytest.mark.parametrize("name", PROCESSES)
def test_no_linear_denoiser_of_drawn_images_does_better(name):
    """Least squares on normal images of that spectrum: noisy => target, frequency by frequency."""
    process, size, std, count = PROCESSES[name], 4, 0.5, 100_000
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(count, size, size, dtype=torch.float64, generator=generator)
    root = natural_power(size).view(size, size).sqrt()
    images = std * torch.fft.ifft2(torch.fft.fft2(white) * root).real[:, None]
    assert images.std().item() == pytest.approx(std, rel=0.01)
    times = at(process, TIMES)
    expected = expected_losses(process, times, size, std)
    for time, loss in zip(times, expected.tolist(), strict=True):
        every = time.expand(count).float() if name == "flow" else time.expand(count)
        noise = torch.randn(images.shape, dtype=torch.float64, generator=generator)
        noisy = process.add_noise(images, noise, every).double().flatten(1)
        target = process.target(images, noise, every).double().flatten(1)
        fitted = torch.linalg.lstsq(noisy, target).solution
        found = (target - noisy @ fitted).square().mean().item()
        assert found == pytest.approx(loss, rel=0.02)


def test_without_information_the_loss_is_that_of_knowing_nothing():
    """At the noisiest timestep epsilon is known and the image is not; v is minus the image."""
    noisiest = torch.tensor([999])
    epsilon = expected_losses(PROCESSES["epsilon"], noisiest, 8, 0.5).item()
    assert epsilon == pytest.approx(0.25 * PROCESSES["epsilon"].alphas_cumprod[-1].item(), rel=1e-3)
    assert expected_losses(PROCESSES["v"], noisiest, 8, 0.5).item() == pytest.approx(0.25, rel=1e-3)
    end = torch.tensor([0.9999], dtype=torch.float64)
    assert expected_losses(PROCESSES["flow"], end, 8, 0.5).item() == pytest.approx(0.25, rel=1e-2)


def test_intervals_hold_equal_parts_of_the_root_of_the_loss_and_of_the_log_snr():
    process, times = PROCESSES["v"], torch.arange(1000)
    intervals = Intervals.by_curve(8, gradient_curve(process, times, 16, 0.5))
    roots = expected_losses(process, times, 16, 0.5).sqrt()
    parts = torch.stack([roots[intervals.expert_at(times) == n].sum() for n in range(8)])
    ends = torch.tensor([*intervals.boundaries[:-1], 999])
    falls = -process.log_snr[ends].diff()
    both = (1 - LOG_SNR_SHARE) * parts / parts.sum() + LOG_SNR_SHARE * falls / falls.sum()
    torch.testing.assert_close(both, torch.full_like(both, 1 / 8), rtol=0.04, atol=0)


def test_times_that_are_drawn_seldom_hold_less_of_the_gradient():
    """Each interval's mass of drawn times, times its mean size, as against all of them."""
    process, distribution = Flow(), LogitNormal()
    intervals = Intervals.continuous_by_curve(
        8, lambda times: gradient_curve(process, times, 16, 0.5, distribution)
    )
    generator = torch.Generator().manual_seed(0)
    drawn = distribution.quantile(
        torch.rand(400_000, dtype=torch.float64, generator=generator).clamp(0.001, 0.999)
    )
    sizes = expected_losses(process, drawn, 16, 0.5).sqrt()
    owners = intervals.expert_at(drawn)
    parts = torch.stack([sizes[owners == n].sum() for n in range(8)]) / sizes.sum()
    ends = torch.tensor([0.001, *intervals.boundaries[1:-1], 0.999], dtype=torch.float64)
    falls = -process.log_snr(ends).diff()
    both = (1 - LOG_SNR_SHARE) * parts + LOG_SNR_SHARE * falls / falls.sum()
    torch.testing.assert_close(both, torch.full_like(both, 1 / 8), rtol=0.02, atol=0)


def test_epsilon_has_more_intervals_where_its_gradient_is_larger_than_its_loss_says():
    """Measured sizes over the root of the loss: 4.6 at t = 0, 1.6 at 10, 1.1 at 250."""
    process, times = PROCESSES["epsilon"], torch.arange(1000)
    intervals = Intervals.by_curve(20, gradient_curve(process, times, 16, 0.5))
    assert intervals.boundaries[1] < 6
    assert 40 < intervals.boundaries[5] < 60


def test_spreading_images_so_makes_the_gradient_least_noisy():
    """Sizes of gradients as the root of the loss: the variance of a mean over one image each."""
    process, times = PROCESSES["epsilon"], torch.arange(1000)
    squares = expected_losses(process, times, 16, 0.5)

    def variance(intervals: Intervals) -> float:
        shares = torch.tensor(intervals.masses, dtype=torch.float64)
        owners = intervals.expert_at(times)
        means = torch.stack([squares[owners == n].mean() for n in range(20)])
        return float((shares.square() * means).sum())

    by_loss = variance(Intervals.by_curve(20, gradient_curve(process, times, 16, 0.5)))
    assert by_loss < 0.8 * variance(Intervals.by_curve(20, process.log_snr))
    assert by_loss < 0.8 * variance(Intervals.uniform(20))
