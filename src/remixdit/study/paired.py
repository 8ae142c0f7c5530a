"""Paired differences between variants: by seed, and for the kernel distance by image.

difference in per cent of the baseline, its mean, its 95 % interval, and how many seeds are better
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Paired", "as_text", "mean_of", "paired", "paired_kernels"]

NORMAL = 1.96  # quantile of the 95 % interval over thousands of images
Shifts = Mapping[str, np.ndarray]  # "real" (B,) and "fake" (B',) of one kernel distance


class Paired(NamedTuple):
    """A variant against a baseline, seed by seed."""

    mean: float
    """Mean of the differences in per cent of the baseline; negative is better."""
    reach: float
    """Half the 95 % interval over seeds; NaN for one seed."""
    wins: int
    """Number of seeds in which the variant is lower."""
    seeds: int


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
    """Compare losses by seed; None without a seed that both have."""
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    ratios = np.array([100 * (values[seed] / baseline[seed] - 1) for seed in seeds])
    return Paired(
        float(ratios.mean()), reach_over_seeds(ratios), int((ratios < 0).sum()), len(seeds)
    )


def reach_over_seeds(values: np.ndarray) -> float:
    """Return half the 95 % interval of the mean by Student's t over seeds, NaN for one seed."""
    if len(values) < 2:
        return float("nan")
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def paired_kernels(
    distances: Mapping[int, float],
    shifts: Mapping[int, Shifts],
    baseline: Mapping[int, float],
    baseline_shifts: Mapping[int, Shifts],
) -> Paired | None:
    """Compare kernel distances by seed; the interval holds the error over images too.

    All cells draw the same noise and are held against the same images, so the shifts of an image
    are averaged over the seeds before they are squared.

    Args:
        distances: Kernel distance of the variant by seed.
        shifts: What each image contributes to it, by seed.
        baseline: Kernel distance of the baseline by seed.
        baseline_shifts: What each image contributes to that.

    Returns:
        The comparison in per cent of the baseline's mean; None without a seed that both have.
    """
    seeds = sorted(distances.keys() & baseline.keys() & shifts.keys() & baseline_shifts.keys())
    if not seeds:
        return None
    scale = 100 / np.mean([baseline[seed] for seed in seeds])
    changes = scale * np.array([distances[seed] - baseline[seed] for seed in seeds])
    over_images = (
        NORMAL
        * scale
        * error_over_images(
            [shifts[seed] for seed in seeds], [baseline_shifts[seed] for seed in seeds]
        )
    )
    over_seeds = reach_over_seeds(changes)
    reach = over_images if np.isnan(over_seeds) else np.hypot(over_seeds, over_images)
    return Paired(float(changes.mean()), float(reach), int((changes < 0).sum()), len(seeds))


def error_over_images(ours: Sequence[Shifts], theirs: Sequence[Shifts]) -> float:
    """Return the jackknife error of the mean difference of two kernel distances.

    Args:
        ours: Shifts by seed.
        theirs: Shifts of the other by seed.
    """
    variance = 0.0
    for name in ("real", "fake"):
        pairs = zip(ours, theirs, strict=True)
        shifts = np.mean([first[name] - second[name] for first, second in pairs], axis=0)
        variance += (len(shifts) - 1) / len(shifts) * float((shifts**2).sum())
    return float(variance**0.5)


def mean_of(values: Sequence[float], digits: int) -> str:
    """Return "mean ± standard deviation"."""
    if not values:
        return ""
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def as_text(found: Paired | None) -> str:
    """Return a paired difference for a table."""
    if found is None:
        return ""
    reach = f" ± {found.reach:.2f}" if np.isfinite(found.reach) else ""
    return f"{found.mean:+.2f}{reach} ({found.wins}/{found.seeds})"
