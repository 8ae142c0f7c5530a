"""Features of images => numbers: pure functions, in float64, on the device of the features.

    frechet_distance = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))                arXiv:1706.08500
    kernel_distance  = E k(x, x') + E k(y, y') - 2 E k(x, y), k = (x.y / F + 1)^3 arXiv:1801.01401
    inception_score  = exp(E KL(p(class | image) || p(class)))                    arXiv:1606.03498
    precision_recall = fractions inside the other set's k-nearest-neighbour balls arXiv:1904.06991

Distances are better when lower, the rest when higher. What a score may be called depends on the
extractor that made the features: `remixdit.features.metric_name` says it.

Shapes: B images, F features, C classes.
"""

from remixdit.evaluation.metrics.classes import (
    LinearProbe,
    fit_linear_probe,
    inception_score,
    linear_probe_accuracy,
)
from remixdit.evaluation.metrics.gaussians import (
    Gaussian,
    Moments,
    bootstrap_frechet,
    frechet_distance,
    gaussian,
    jackknife_frechet,
)
from remixdit.evaluation.metrics.kernels import (
    KernelDistance,
    kernel_distance,
    kernel_distance_subsets,
    kernel_shifts,
)
from remixdit.evaluation.metrics.neighbours import (
    Memorisation,
    PrecisionRecall,
    memorisation,
    nearest_neighbours,
    precision_recall,
)
from remixdit.evaluation.metrics.samples import Estimate, Spread, real_floor
from remixdit.evaluation.metrics.selftest import Check, self_test

__all__ = [
    "Check",
    "Estimate",
    "Gaussian",
    "KernelDistance",
    "LinearProbe",
    "Memorisation",
    "Moments",
    "PrecisionRecall",
    "Spread",
    "bootstrap_frechet",
    "fit_linear_probe",
    "frechet_distance",
    "gaussian",
    "inception_score",
    "jackknife_frechet",
    "kernel_distance",
    "kernel_distance_subsets",
    "kernel_shifts",
    "linear_probe_accuracy",
    "memorisation",
    "nearest_neighbours",
    "precision_recall",
    "real_floor",
    "self_test",
]
