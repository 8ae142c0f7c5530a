"""Intervals of timesteps, one for each expert, and the draw of experts and timesteps.

N contiguous intervals cover [0, T) without gap or overlap; expert n owns interval n, and 0 is the
least noisy. Timesteps are integers in [0, T) (diffusion) or floats in [0, 1] (flow matching):

    boundaries[n] <= timestep < boundaries[n + 1],      uniform: boundaries[n] = floor(n T / N)

A step draws M distinct experts. Expert n is drawn with a probability in proportion to `masses[n]`,
its interval's share of the timestep distribution, as far as distinctness allows; `Draw.weights`
makes up for the rest, so that the expected gradient is that of independent timesteps.

Shapes: B batch, N experts, M experts of a step, T = num_train_timesteps.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from remixdit.seeds import generator_for

__all__ = ["Draw", "Intervals", "LogitNormal", "Uniform", "moved"]

GRID = 100_001  # times at which a curve over [0, 1] is known


@dataclass(frozen=True)
class Uniform:
    """Timesteps uniform over the whole range."""

    def cdf(self, position: float) -> float:
        """Return the mass below `position` in [0, 1]."""
        return position

    def quantile(self, masses: Tensor) -> Tensor:
        """Return the positions in [0, 1] with the given masses below them, float64."""
        return masses

    def density(self, positions: Tensor) -> Tensor:
        """Return how much more likely each of the positions in (0, 1) is than on average."""
        return torch.ones_like(positions)


@dataclass(frozen=True)
class LogitNormal:
    """Times t with normal logit(t), which favours the middle of the path (arXiv:2403.03206)."""

    mean: float = 0.0
    """Mean of logit(t); above 0 for more noise."""
    std: float = 1.0
    """Standard deviation of logit(t), above 0."""

    def __post_init__(self) -> None:
        """Refuse a standard deviation that is not positive."""
        if self.std <= 0:
            raise ValueError(f"std must be above 0, got {self.std}")

    def cdf(self, position: float) -> float:
        """Return the mass below `position` in [0, 1]."""
        if not 0 < position < 1:
            return float(position >= 1)
        logit = math.log(position / (1 - position))
        return 0.5 * (1 + math.erf((logit - self.mean) / (self.std * math.sqrt(2))))

    def quantile(self, masses: Tensor) -> Tensor:
        """Return the positions in [0, 1] with the given masses below them, float64."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(masses))

    def density(self, positions: Tensor) -> Tensor:
        """Return how much more likely each of the positions in (0, 1) is than on average."""
        scores = (torch.logit(positions) - self.mean) / self.std
        normal = torch.exp(-0.5 * scores.square()) / (self.std * math.sqrt(2 * math.pi))
        return normal / (positions * (1 - positions))


@dataclass(frozen=True)
class Draw:
    """The experts of one step."""

    experts: tuple[int, ...]
    """(M,) distinct experts, in rising order."""
    weights: tuple[float, ...]
    """(M,) weights of the experts' mean losses; their expected sum is 1."""


@dataclass(frozen=True)
class Intervals:
    """N contiguous intervals of timesteps.

    Args:
        boundaries: (N + 1,) rising numbers: integers from 0 to T, or floats from 0 to 1.
        distribution: Distribution of training timesteps over the range.
    """

    boundaries: tuple[int, ...] | tuple[float, ...]
    distribution: Uniform | LogitNormal = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        """Refuse boundaries that leave gaps or empty intervals."""
        rising = all(a < b for a, b in itertools.pairwise(self.boundaries))
        if len(self.boundaries) < 2 or self.boundaries[0] != 0 or not rising:
            raise ValueError(f"boundaries must rise from 0, got {list(self.boundaries)}")
        if self.is_continuous and self.boundaries[-1] != 1:
            raise ValueError(f"continuous boundaries must end at 1, got {self.boundaries[-1]}")

    @classmethod
    def uniform(cls, num_experts: int, num_train_timesteps: int = 1000) -> "Intervals":
        """Cut [0, T) at floor(n T / N).

        Args:
            num_experts: Number of experts, N, in 1..T; T need not be a multiple.
            num_train_timesteps: Number of timesteps, T.
        """
        check_count(num_experts, num_train_timesteps)
        cuts = (n * num_train_timesteps // num_experts for n in range(num_experts + 1))
        return cls(tuple(cuts))

    @classmethod
    def continuous(
        cls, num_experts: int, distribution: Uniform | LogitNormal | None = None
    ) -> "Intervals":
        """Cut [0, 1] into N parts of equal width.

        Args:
            num_experts: Number of experts, N, at least 1.
            distribution: Distribution of training timesteps over [0, 1]; None for uniform.
        """
        check_count(num_experts, None)
        cuts = tuple(n / num_experts for n in range(num_experts + 1))
        return cls(cuts, distribution or Uniform())

    @classmethod
    def by_curve(cls, num_experts: int, curve: Tensor) -> "Intervals":
        """Cut [0, T) where a curve has moved by equal steps, at least one timestep apart.

        Args:
            num_experts: Number of experts, N, in 1..T.
            curve: (T,) rising or falling numbers, such as the log-SNR of each timestep.
        """
        total = len(curve)
        check_count(num_experts, total)
        cuts = [0, *torch.searchsorted(moved(curve), levels_of(num_experts)).tolist(), total]
        for n in range(1, num_experts):
            # One timestep at least for this interval, and for each of those still to come.
            cuts[n] = min(max(cuts[n], cuts[n - 1] + 1), total - (num_experts - n))
        return cls(tuple(cuts))

    @classmethod
    def continuous_by_curve(
        cls, num_experts: int, curve: Callable[[Tensor], Tensor]
    ) -> "Intervals":
        """Cut [0, 1] where a curve has moved by equal steps between t = 0.001 and t = 0.999.

        Args:
            num_experts: Number of experts, N, at least 1.
            curve: Rising or falling function of t, applied to float64 tensors.
        """
        check_count(num_experts, None)
        grid = torch.linspace(0.001, 0.999, GRID, dtype=torch.float64)
        inner = grid[torch.searchsorted(moved(curve(grid)), levels_of(num_experts))].tolist()
        return cls((0.0, *inner, 1.0))

    @property
    def num_experts(self) -> int:
        """Number of experts, N."""
        return len(self.boundaries) - 1

    @property
    def is_continuous(self) -> bool:
        """Whether timesteps are floats in [0, 1]."""
        return isinstance(self.boundaries[-1], float)

    @property
    def masses(self) -> tuple[float, ...]:
        """(N,) shares of the training timesteps in the intervals; their sum is 1."""
        end = self.boundaries[-1]
        below = [self.distribution.cdf(boundary / end) for boundary in self.boundaries]
        return tuple(b - a for a, b in itertools.pairwise(below))

    def expert_at(self, timesteps: Tensor) -> Tensor:
        """Return the expert of each timestep.

        Args:
            timesteps: (B,) integers in [0, T), or floats in [0, 1]; t = 1 belongs to the last.

        Returns:
            (B,) integers in [0, N).
        """
        end = self.boundaries[-1]
        outside = (timesteps < 0) | ((timesteps > 1) if self.is_continuous else (timesteps >= end))
        if outside.any():
            bound = "[0, 1]" if self.is_continuous else f"[0, {end})"
            raise ValueError(f"timesteps must be in {bound}, got {timesteps[outside][0].item()}")
        # Integer timesteps may come as floats: 124.5 belongs where 124 does. In float64, which
        # holds boundaries and timesteps exactly.
        inner = torch.tensor(self.boundaries[1:-1], dtype=torch.float64, device=timesteps.device)
        return torch.searchsorted(inner, timesteps.double().contiguous(), right=True)

    def draw_experts(self, count: int, seed: int, step: int) -> Draw:
        """Draw the distinct experts of one step.

        Args:
            count: Number of experts, M, in 1..N.
            seed: Seed of the run.
            step: The optimizer step; the same (seed, step) gives the same experts everywhere.
        """
        if not 1 <= count <= self.num_experts:
            raise ValueError(f"experts_per_step must be in 1..{self.num_experts}, got {count}")
        masses = self.masses
        chances = inclusion_chances(masses, count)
        generator = generator_for(seed, "experts", step)
        experts = systematic_sample(chances, count, generator)
        weights = tuple(masses[n] / chances[n] for n in experts)
        return Draw(tuple(experts), weights)

    def draw_timesteps(self, expert: int, count: int, generator: torch.Generator) -> Tensor:
        """Draw training timesteps inside one interval.

        Args:
            expert: Index in [0, N).
            count: Number of timesteps, B.
            generator: CPU generator.

        Returns:
            (B,) int64 in [boundaries[n], boundaries[n + 1]), or float32 for continuous time.
        """
        uniform = torch.rand(count, dtype=torch.float64, generator=generator)
        return self.timesteps_at(torch.full((count,), expert), uniform)

    def timesteps_at(self, experts: Tensor, uniform: Tensor) -> Tensor:
        """Return the training timesteps for uniform numbers, each inside its interval.

        Args:
            experts: (B,) integers in [0, N).
            uniform: (B,) float64 in [0, 1): the place of each timestep in its interval, in
                proportion to the training distribution.

        Returns:
            (B,) int64 in [boundaries[n], boundaries[n + 1]), or float32 for continuous time.
        """
        if not self.is_continuous:
            starts, stops = self._ends(self.boundaries, torch.int64, experts)
            return starts + (uniform * (stops - starts)).long()
        below = [self.distribution.cdf(boundary) for boundary in self.boundaries]
        low, high = self._ends(below, torch.float64, experts)
        drawn = self.distribution.quantile(low + uniform * (high - low)).float()
        least = torch.stack([float32_at_least(start) for start in self.boundaries[:-1]])
        most = torch.stack([float32_below(stop) for stop in self.boundaries[1:]])
        return drawn.clamp(least[experts], most[experts])

    def _ends(
        self, cuts: Sequence[float], dtype: torch.dtype, experts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (B,) starts and (B,) ends of the images' intervals among N + 1 cuts."""
        values = torch.tensor(cuts, dtype=dtype)
        return values[experts], values[experts + 1]


def moved(curve: Tensor) -> Tensor:
    """Return how far a curve has moved from its start, as a share of its whole way."""
    curve = curve.double()
    return (curve[0] - curve) / (curve[0] - curve[-1])


def levels_of(num_experts: int) -> Tensor:
    """Return (N - 1,) shares at which N equal parts meet."""
    return torch.linspace(0, 1, num_experts + 1, dtype=torch.float64)[1:-1]


def check_count(num_experts: int, num_train_timesteps: int | None) -> None:
    """Refuse more experts than there are timesteps, or none."""
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if num_train_timesteps is not None and num_experts > num_train_timesteps:
        raise ValueError(
            f"num_experts must be at most num_train_timesteps {num_train_timesteps}, "
            f"got {num_experts}"
        )


def float32_at_least(boundary: float) -> Tensor:
    """Return the smallest float32 that is not below a boundary: rounding must not cross it."""
    rounded = torch.tensor(boundary, dtype=torch.float32)
    return rounded if float(rounded) >= boundary else rounded.nextafter(torch.tensor(2.0))


def float32_below(boundary: float) -> Tensor:
    """Return the largest float32 below a boundary."""
    rounded = torch.tensor(boundary, dtype=torch.float32)
    return rounded if float(rounded) < boundary else rounded.nextafter(torch.tensor(-1.0))


def inclusion_chances(masses: Sequence[float], count: int) -> list[float]:
    """Return the probability that each expert is among `count` distinct ones.

    The probabilities are in proportion to the masses, but at most 1: the excess of a heavy interval
    goes to the others. Their sum is `count`.
    """
    certain: set[int] = set()
    while True:
        rest = [n for n in range(len(masses)) if n not in certain]
        scale = (count - len(certain)) / sum(masses[n] for n in rest) if rest else 0.0
        over = {n for n in rest if masses[n] * scale >= 1}
        if not over:
            return [1.0 if n in certain else mass * scale for n, mass in enumerate(masses)]
        certain |= over


def systematic_sample(
    chances: Sequence[float], count: int, generator: torch.Generator
) -> list[int]:
    """Draw `count` distinct indices, index n with probability exactly `chances[n]`.

    The chances are laid end to end in a random order and read at one random offset and every
    whole number after it (Madow's systematic sampling).
    """
    order = torch.randperm(len(chances), generator=generator).tolist()
    offset = float(torch.rand((), dtype=torch.float64, generator=generator))
    chosen, upto = [], 0.0
    for n in order:
        before, upto = upto, upto + chances[n]
        if math.floor(upto - offset) > math.floor(before - offset):
            chosen.append(n)
    # Rounding can leave the last of the sum just below its whole number.
    missing = [n for n in reversed(order) if n not in chosen][: count - len(chosen)]
    return sorted(chosen + missing)
