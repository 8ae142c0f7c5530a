"""AdamW for bases that are never told their gradients, with the average of the weights.

For basis k of a mixture, with plain gradients g and coefficients c (arXiv 1711.05101):

    grad[k] = sum_r c[r, k] * g[r]
    exp_avg = lerp(exp_avg, grad, 1 - beta1),    exp_avg_sq = lerp(exp_avg_sq, grad^2, 1 - beta2)
    bases -= lr * (weight_decay * bases + exp_avg / (1 - beta1^t) / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps))
    ema = lerp(ema, bases, 1 - ema_decay)

`kernels.adamw_step` does all of it in one pass over memory. Shared parameters and logits take the
same step with K = 1. With one basis it is torch.optim.AdamW, bit for bit.

The average takes in the new weights one step later, when the next pass reads them anyway; who
reads it before gets it complete.

Shapes: K bases, P numbers of a segment, R gradients, L tables, N experts.
"""  # noqa: E501

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from remixdit.first import kernels
from remixdit.first.mixing import Mixture
from remixdit.first.segments import Segment
from remixdit.first.sharding import total_of
from remixdit.first.step_gradients import StepGradients

__all__ = ["MixtureAdamW", "OptimizerConfig", "StepStats"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights are updated."""

    learning_rate: float = 1e-4
    """Of the bases, after warm-up."""
    shared_learning_rate: float | None = None
    """Of the parameters that are not mixed; the same as of the bases if not given."""
    coefficients_learning_rate: float = 1e-2
    """Of the logits."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled decay of bases and shared parameters; the logits have none."""
    warmup_steps: int = 0
    """Steps over which the learning rates rise from 0."""
    lr_schedule: str = "constant"
    """constant, or cosine: falls to 0 at the last step."""
    max_grad_norm: float = 1.0
    """Norm of the plain gradient above which all gradients are scaled down; 0 for never."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights, which sampling uses."""
    ema_warmup: bool = True
    """Let the average start fast: its decay is at most (1 + step) / (10 + step)."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in (
            *("learning_rate", "shared_learning_rate", "coefficients_learning_rate", "eps"),
            *("weight_decay", "warmup_steps", "max_grad_norm"),
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:  # so that NaN fails too
                raise ValueError(f"{name} must be at least 0, got {value}")
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas must be in [0, 1), got {beta}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.lr_schedule not in ("constant", "cosine"):
            raise ValueError(f"lr_schedule must be constant or cosine, got {self.lr_schedule!r}")

    def lr_factor(self, step: int, total_steps: int) -> float:
        """Return what learning rates are multiplied by at `step` in [0, total_steps)."""
        factor = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.lr_schedule == "cosine":
            progress = (step + 1 - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
            factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
        return factor

    def ema_weight(self, step: int) -> float:
        """Return the share of the new weights in the average after optimizer step `step`."""
        warmed = (1 + step) / (10 + step) if self.ema_warmup else 1.0
        return 1 - min(self.ema_decay, warmed)


class StepStats(NamedTuple):
    """What one optimizer step saw; tensors, so that nothing waits for the device."""

    grad_norm: Tensor
    """Norm of the sum of the plain gradients, before clipping."""
    logits_task_grad: Tensor
    """Norm of the gradient that the task gives the logits."""
    logits_prior_grad: Tensor
    """Norm of the gradient that the prior gives the logits, its strength included."""


class MixtureAdamW:
    """The optimizer of a mixture: its state, the gradients of a step, and the step.

    Args:
        mixture: Its bases, shared parameters and logits are updated in place.
        config: Rates and decays.
        compile: Whether updates run as compiled kernels; by default on a GPU. The first step of
            each shape then takes seconds.
    """

    def __init__(
        self, mixture: Mixture, config: OptimizerConfig, compile: bool | None = None
    ) -> None:
        self.mixture, self.config = mixture, config
        self.gradients = StepGradients(mixture)
        masters = [segment.bases for segment in mixture.segments]
        masters.append(mixture.logits.detach().view(1, -1))
        self.exp_avg = [torch.zeros_like(values) for values in masters]
        self.exp_avg_sq = [torch.zeros_like(values) for values in masters]
        self.compile = mixture.device.type == "cuda" if compile is None else compile
        self._ema = [values.clone() for values in masters]
        # (K,) each: the share in which the average has yet to take in the weights as they are.
        self._pending = [[0.0] * len(values) for values in masters]
        # Steps that each basis took: with frozen one-hot coefficients an expert that was not drawn
        # does not move, as if it were trained alone.
        self.basis_steps = [0] * mixture.num_bases

    def step(self, step: int, total_steps: int, prior_strength: float = 0.0) -> StepStats:
        """Update all weights from what `gradients` has collected.

        A gradient that is not finite counts as zero. Scaled down by clipping are the plain
        gradients and, with them, the task gradient of the logits.

        Args:
            step: Optimizer steps done so far.
            total_steps: Of the whole run, for the schedule.
            prior_strength: gamma, of the prior on the logits.
        """
        norm = self._grad_norm()
        scale = self._clip_scale(norm)
        lr_factor = self.config.lr_factor(step, total_steps)
        stats = self._logits_grads(scale, prior_strength)
        task, prior = stats
        for i, segment in enumerate(self.mixture.segments):
            self._update_segment(i, segment, scale, step, lr_factor)
        if self.mixture.kind != "one_hot":
            rates = (self.config.coefficients_learning_rate * lr_factor, 0.0)
            grads = (task + prior).view(1, -1)
            self._update(len(self.mixture.segments), grads, None, step, rates)
        drawn = self._active_rows()
        self.basis_steps = [s + (k in drawn) for k, s in enumerate(self.basis_steps)]
        self.mixture.weights_changed()
        return StepStats(norm, task.norm(), prior.norm())

    @property
    def ema(self) -> list[Tensor]:
        """The averages of each segment's bases, (K, P), and of the logits (1, L * N * K)."""
        for i, pending in enumerate(self._pending):
            masters = self._masters(i)
            for k, weight in enumerate(pending):
                if weight:
                    self._ema[i][k].lerp_(masters[k], weight)
                    pending[k] = 0.0
        return self._ema

    def averaged(self) -> AbstractContextManager[None]:
        """Use the averaged weights inside a `with`."""
        *bases, logits = self.ema
        return self.mixture.swapped(bases, logits.view_as(self.mixture.logits))

    def state_dict(self) -> dict[str, Tensor]:
        """Return both moments of every parameter, by kind and name; views, unless sharded."""
        state: dict[str, Tensor] = {}
        for kind in ("exp_avg", "exp_avg_sq"):
            flats = getattr(self, kind)
            for segment, flat in zip(self.mixture.segments, flats, strict=False):
                named = segment.named(flat)
                state.update({f"{kind}.{name}": values for name, values in named.items()})
            state[f"{kind}.logits"] = flats[-1].view_as(self.mixture.logits)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], basis_steps: Sequence[int]) -> None:
        """Copy moments as given by `state_dict` in; the averages are loaded with the weights."""
        for kind in ("exp_avg", "exp_avg_sq"):
            flats = getattr(self, kind)
            for segment, flat in zip(self.mixture.segments, flats, strict=False):
                segment.load(flat, (state[f"{kind}.{name}"] for name in segment.names))
            flats[-1].copy_(state[f"{kind}.logits"].view(1, -1))
        self.basis_steps = list(basis_steps)

    @torch.no_grad()
    def _grad_norm(self) -> Tensor:
        """Return the norm of the sum of the step's plain gradients.

        The coefficients of an expert sum to 1, so the gradients of the bases have the same sum.
        """
        total = torch.zeros((), device=self.mixture.device)
        for segment in self.mixture.segments:
            assert segment.grads is not None
            rows = segment.grads
            total += (rows[0] if len(rows) == 1 else rows.sum(0)).float().square().sum()
        return total_of(total, self.mixture.sharding).sqrt()

    @torch.no_grad()
    def _clip_scale(self, norm: Tensor) -> Tensor:
        """Return what gradients are multiplied by; clears them if their norm is not finite."""
        limit = self.config.max_grad_norm
        scale = torch.clamp(limit / (norm + 1e-6), max=1.0) if limit else torch.ones_like(norm)
        finite = norm.isfinite()
        if norm.device.type == "cpu" and finite:  # on a CPU the look costs nothing
            return scale
        for segment in self.mixture.segments:
            assert segment.grads is not None
            segment.grads.copy_(torch.where(finite, segment.grads, 0.0))
        return torch.where(finite, scale, 0.0)

    def _logits_grads(self, scale: Tensor, prior_strength: float) -> tuple[Tensor, Tensor]:
        """Return the gradients of the logits from the task and from the prior."""
        mixture = self.mixture
        task = prior = torch.zeros_like(mixture.logits)
        if not mixture.learns_coefficients:
            return task, prior
        grads = self.gradients.coefficient_grads()
        coefficients = torch.stack([mixture.coefficients(expert) for expert, _ in grads])
        dots = torch.stack([values for _, values in grads])
        dots = torch.where(scale > 0, dots * scale, 0.0)
        (task,) = torch.autograd.grad(coefficients, mixture.logits, dots)
        if prior_strength:
            loss = prior_strength * mixture.prior_loss().mean()
            (prior,) = torch.autograd.grad(loss, mixture.logits)
        return task, prior

    def _active_rows(self) -> list[int]:
        """Return the bases that this step updates."""
        mixture = self.mixture
        if mixture.kind != "one_hot":
            return list(range(mixture.num_bases))
        coefficients = mixture.coefficients().detach()[0]  # (N, K)
        return sorted(
            {int(coefficients[expert].argmax()) for expert in self.gradients.drawn_experts}
        )

    def _update_segment(
        self, i: int, segment: Segment, scale: Tensor, step: int, lr_factor: float
    ) -> None:
        config = self.config
        lr = config.learning_rate
        if not segment.is_mixed and config.shared_learning_rate is not None:
            lr = config.shared_learning_rate
        rates = (lr * lr_factor, config.weight_decay)
        weights = self.gradients.basis_weights(segment) * scale
        assert segment.grads is not None
        if not segment.is_mixed or self.mixture.kind != "one_hot":
            self._update(i, segment.grads, weights, step, rates)
            return
        for k in self._active_rows():
            rows = weights[:, k].nonzero()[:, 0]
            grads = segment.grads[rows].sum(0, keepdim=True)
            self._update(i, grads, scale.view(1, 1), self.basis_steps[k], rates, k)

    @torch.no_grad()
    def _update(
        self,
        i: int,
        grads: Tensor,
        weights: Tensor | None,
        steps: int,
        rates: tuple[float, float],
        basis: int | None = None,
    ) -> None:
        """Step with the weights number `i`, all of its bases or one, chunk by chunk."""
        rows = slice(None) if basis is None else slice(basis, basis + 1)
        arrays = (self._masters(i), self.exp_avg[i], self.exp_avg_sq[i], self._ema[i])
        bases, exp_avg, exp_avg_sq, ema = (values[rows] for values in arrays)
        if weights is None:
            weights = torch.ones(1, 1, device=bases.device, dtype=bases.dtype)
        numbers = self._numbers(steps, *rates, self._pending[i][rows][0])
        kernels.update((bases, exp_avg, exp_avg_sq, ema), grads, weights, numbers, self.compile)
        self._pending[i][rows] = [self.config.ema_weight(steps)] * len(bases)

    def _masters(self, i: int) -> Tensor:
        """Return the bases (K, P) of segment i, or after the last the logits (1, L * N * K)."""
        segments = self.mixture.segments
        return segments[i].bases if i < len(segments) else self.mixture.logits.detach().view(1, -1)

    def _numbers(
        self, steps: int, lr: float, weight_decay: float, ema_weight: float
    ) -> kernels.AdamW:
        beta1, beta2 = self.config.betas
        count = steps + 1
        return kernels.AdamW(
            step_size=lr / (1 - beta1**count),
            weight1=1 - beta1,
            beta2=beta2,
            weight2=1 - beta2,
            root=(1 - beta2**count) ** 0.5,
            eps=self.config.eps,
            keep=1 - lr * weight_decay,
            ema_weight=ema_weight,
        )
