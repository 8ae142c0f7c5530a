"""What a classifier says of images: the inception score, and a linear probe on features.

Shapes: B images, F features, C classes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from remixdit.evaluation.metrics.samples import Spread, check_features, spread

__all__ = ["LinearProbe", "fit_linear_probe", "inception_score", "linear_probe_accuracy"]


def inception_score(logits: Tensor, *, num_splits: int = 10, seed: int = 0) -> Spread:
    """Return the inception score over splits: in [1, C], better when higher.

    Args:
        logits: (B, C), at least `num_splits` images; logarithms of probabilities do as well.
        num_splits: Number of parts of equal size, each scored against its own marginal.
        seed: Seed for the shuffle before splitting: images often come sorted by class.
    """
    if num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, got {num_splits}")
    wide = logits.double().clamp_min(torch.finfo(torch.float64).min)  # the logarithm of 0 too
    check_features("logits", wide, at_least=num_splits)
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    probabilities = wide[order.to(wide.device)].softmax(1)  # (B, C)
    return spread([_score(part) for part in probabilities.tensor_split(num_splits)])


class LinearProbe(NamedTuple):
    """A linear classifier of standardised features."""

    weight: Tensor  # (F, C)
    bias: Tensor  # (C,)
    mean: Tensor  # (F,) of the features it was fitted to
    scale: Tensor  # (F,)

    def predict(self, features: Tensor) -> Tensor:
        """Return the class (B,) of features (B, F)."""
        check_features("features", features)
        if features.shape[1] != len(self.mean):
            raise ValueError(
                f"features must have the {len(self.mean)} of the probe, got {features.shape[1]}"
            )
        return self.logits(features).argmax(1)

    def logits(self, features: Tensor) -> Tensor:
        """Return the log-probabilities (B, C) of features (B, F), up to a constant."""
        return (features.double() - self.mean) / self.scale @ self.weight + self.bias

    def accuracy(self, features: Tensor, class_labels: Tensor) -> float:
        """Return the fraction of features (B, F) that get their class label (B,)."""
        _check_labels(features, class_labels)
        return float((self.predict(features) == class_labels).double().mean())


def fit_linear_probe(
    features: Tensor, class_labels: Tensor, *, penalty: float = 1e-2, max_steps: int = 200
) -> LinearProbe:
    """Fit multinomial logistic regression: convex, started from 0, so nothing is drawn.

    Minimises the mean cross-entropy plus penalty / 2 times the sum of squared weights.

    Args:
        features: (B, F).
        class_labels: (B,) integers in [0, C).
        penalty: Weight of the penalty, positive.
        max_steps: Maximum number of L-BFGS steps.
    """
    check_features("features", features, at_least=2)
    _check_labels(features, class_labels)
    if penalty <= 0:
        raise ValueError(f"penalty must be positive, got {penalty}")
    wide = features.detach().double()
    scale, mean = torch.std_mean(wide, 0)
    scale = torch.where(scale > 0, scale, 1.0)  # a constant feature says nothing, and divides
    zeros = wide.new_zeros(wide.shape[1], int(class_labels.max()) + 1)
    start = LinearProbe(zeros, zeros[0].clone(), mean, scale)
    return _minimise(start, wide, class_labels, penalty, max_steps)


def linear_probe_accuracy(
    train_features: Tensor, train_labels: Tensor, features: Tensor, class_labels: Tensor
) -> float:
    """Return how often a probe fitted to real images finds the label that images were made for.

    Args:
        train_features: (B, F) of real images.
        train_labels: (B,) integers in [0, C).
        features: (B', F) of the images under test.
        class_labels: (B',) what they should show.
    """
    return fit_linear_probe(train_features, train_labels).accuracy(features, class_labels)


def _score(probabilities: Tensor) -> float:
    # E KL(p(c|x) || p(c)) = H(p(c)) - E H(p(c|x)), and entr knows that 0 log 0 = 0.
    marginal_entropy = torch.special.entr(probabilities.mean(0)).sum()
    return float((marginal_entropy - torch.special.entr(probabilities).sum(1).mean()).exp())


def _minimise(
    probe: LinearProbe, features: Tensor, class_labels: Tensor, penalty: float, max_steps: int
) -> LinearProbe:
    parameters = [probe.weight.requires_grad_(), probe.bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=max_steps,
        tolerance_grad=1e-8,
        tolerance_change=1e-14,  # the default stops when weights are good to four digits
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(probe.logits(features), class_labels)
        value = value + penalty / 2 * probe.weight.square().sum()
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return LinearProbe(probe.weight.detach(), probe.bias.detach(), probe.mean, probe.scale)


def _check_labels(features: Tensor, class_labels: Tensor) -> None:
    if class_labels.shape != features.shape[:1]:
        raise ValueError(
            f"class_labels must have the shape ({len(features)},), got {tuple(class_labels.shape)}"
        )
