"""Mean and covariance of features, and the Fréchet distance between two such pairs.

    distance = |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))

C1 C2 is not symmetric, but it has the eigenvalues of R C2 R with R = C1^(1/2), which is: so the
trace is a sum of square roots of real eigenvalues, and no complex square root arises.

Shapes: B images, F features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from remixdit.evaluation.metrics.samples import Estimate, check_features

__all__ = [
    "Gaussian",
    "Moments",
    "bootstrap_frechet",
    "frechet_distance",
    "gaussian",
    "jackknife_frechet",
]


class Gaussian(NamedTuple):
    """Mean and covariance of features; any such pair of tensors will do in its place."""

    mean: Tensor  # (F,)
    covariance: Tensor  # (F, F), divided by B - 1 as np.cov does


class Moments:
    """Running sums of features, from which mean and covariance follow.

    `state` (1 + F + F * F,) float64 holds the count, the sum and the sum of outer products. It
    is additive, so one all-reduce of it merges the processes of a run.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        self.num_features = num_features
        size = 1 + num_features + num_features**2
        self.state = torch.zeros(size, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add a batch of features (B, F)."""
        check_features("features", features)
        self._check_num_features(features.shape[1])
        wide = features.to(self.state)
        count, total, outer = self._parts()
        count += len(wide)
        total += wide.sum(0)
        outer.addmm_(wide.T, wide)

    def merge(self, other: "Moments") -> None:
        """Add what another process has seen."""
        self._check_num_features(other.num_features)
        self.state += other.state.to(self.state)

    def gaussian(self) -> Gaussian:
        """Return mean and covariance of all features seen."""
        count, total, outer = self._parts()
        if count < 2:
            raise ValueError(f"num_images must be at least 2 for a covariance, got {int(count)}")
        mean = total / count
        return Gaussian(mean, (outer - count * torch.outer(mean, mean)) / (count - 1))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        end = 1 + self.num_features  # views, so that sums in place reach `state`
        return self.state[0], self.state[1:end], self.state[end:].view(2 * (self.num_features,))

    def _check_num_features(self, num_features: int) -> None:
        if num_features != self.num_features:
            raise ValueError(f"num_features must be {self.num_features}, got {num_features}")


def gaussian(features: Tensor) -> Gaussian:
    """Return mean and covariance of features (B, F), B at least 2."""
    check_features("features", features, at_least=2)
    wide = features.double()
    centred = wide - wide.mean(0)
    return Gaussian(wide.mean(0), centred.T @ centred / (len(wide) - 1))


def frechet_distance(real: tuple[Tensor, Tensor], fake: tuple[Tensor, Tensor]) -> float:
    """Return the Fréchet distance of two Gaussians: symmetric, 0 when equal, up to rounding.

    From features it is biased upward, by about 1 / B: compare at equal numbers of images.

    Args:
        real: Mean (F,) and covariance (F, F).
        fake: Mean (F,) and covariance (F, F).
    """
    real, fake = _gaussian_pair("real", real), _gaussian_pair("fake", fake)
    if len(real.mean) != len(fake.mean):
        raise ValueError(
            f"fake must have the {len(real.mean)} features of real, got {len(fake.mean)}"
        )
    return _distance(real, _symmetric_root(real.covariance), fake)


def jackknife_frechet(
    real: tuple[Tensor, Tensor], fake: Tensor, *, num_groups: int = 20, seed: int = 0
) -> Estimate:
    """Return the Fréchet distance to a fixed reference, with the error of leaving groups out.

    Args:
        real: Mean (F,) and covariance (F, F) of the reference, taken as exact.
        fake: (B, F) features of the images under test, at least 2 images a group.
        num_groups: Number of groups, at least 2; 20 give the standard error to about 16 %.
        seed: Seed for the division into groups.
    """
    if num_groups < 2:
        raise ValueError(f"num_groups must be at least 2, got {num_groups}")
    check_features("fake", fake, at_least=2 * num_groups)
    value, reference, root = _with_root(real, fake)
    whole = Moments(fake.shape[1], fake.device)
    whole.update(fake)
    order = torch.randperm(len(fake), generator=torch.Generator().manual_seed(seed))
    distances = []
    for rows in order.to(fake.device).tensor_split(num_groups):
        rest = Moments(fake.shape[1], fake.device)
        rest.update(fake[rows])
        rest.state = whole.state - rest.state
        distances.append(_distance(reference, root, rest.gaussian()))
    variance = torch.tensor(distances, dtype=torch.float64).var(correction=0)
    return Estimate(value, float((num_groups - 1) * variance) ** 0.5)


def bootstrap_frechet(
    real: tuple[Tensor, Tensor], fake: Tensor, *, num_resamples: int = 50, seed: int = 0
) -> Estimate:
    """Return the Fréchet distance to a fixed reference, with the error of resampling images.

    With few images a feature this error is too large, up to threefold at one image a feature
    (docs/metrics.md): images drawn twice blur the covariance more than fresh ones would. Then
    `jackknife_frechet` is right. The mean of the resamples lies above the value, for the same
    reason, so their percentiles would miss it: `interval` is centred on the value.

    Args:
        real: Mean (F,) and covariance (F, F) of the reference, taken as exact.
        fake: (B, F) features of the images under test.
        num_resamples: Number of resamples, at least 2; 50 give the standard error to 10 %.
        seed: Seed for the resampling.
    """
    if num_resamples < 2:
        raise ValueError(f"num_resamples must be at least 2, got {num_resamples}")
    value, reference, root = _with_root(real, fake)
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(num_resamples):
        rows = torch.randint(len(fake), (len(fake),), generator=generator)
        distances.append(_distance(reference, root, gaussian(fake[rows.to(fake.device)])))
    return Estimate(value, float(torch.tensor(distances, dtype=torch.float64).std()))


def _with_root(real: tuple[Tensor, Tensor], fake: Tensor) -> tuple[float, Gaussian, Tensor]:
    value = frechet_distance(real, gaussian(fake))
    reference = _gaussian_pair("real", real)
    return value, reference, _symmetric_root(reference.covariance)


def _distance(real: Gaussian, real_root: Tensor, fake: Gaussian) -> float:
    product = real_root @ fake.covariance @ real_root
    # Rounding makes eigenvalues that are 0 slightly negative, here and in the root.
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0)
    shift = real.mean - fake.mean
    traces = real.covariance.trace() + fake.covariance.trace()
    return float(shift @ shift + traces - 2 * eigenvalues.sqrt().sum())


def _symmetric_root(matrix: Tensor) -> Tensor:
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    return eigenvectors * eigenvalues.clamp_min(0).sqrt() @ eigenvectors.T


def _gaussian_pair(field: str, pair: tuple[Tensor, Tensor]) -> Gaussian:
    mean, covariance = pair
    size = mean.numel()
    if mean.ndim != 1 or covariance.shape != (size, size):
        raise ValueError(
            f"{field} must be a mean (F,) and a covariance (F, F), "
            f"got {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    return Gaussian(mean.double(), covariance.double())
