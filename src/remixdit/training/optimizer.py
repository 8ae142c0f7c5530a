"""AdamW, or Muon beside it, its learning rates and their schedule, and clipping.

    bases (K, *)     learning_rate                 weight_decay
    shared (*)       learning_rate                 weight_decay
    logits (N, K)    coefficients_learning_rate    none

With Muon, what it leaves to AdamW has adamw_learning_rate. What is shared has shared_learning_rate
instead of either, if that is given.

Nothing here knows of mixing: bases are parameters like any other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from remixdit.distributed.parallel import local, sharded_like, whole
from remixdit.mixture.experts import Experts
from remixdit.mixture.names import matches, patterns_of
from remixdit.training.muon import MuonAdamW

__all__ = [
    "OptimizerConfig",
    "clip",
    "gradients_of_logits",
    "optimizer_of",
    "set_learning_rates",
    "step_if",
]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Muon, its learning rates, clipping, and the average of the weights."""

    algorithm: str = "adamw"
    """Optimizer: adamw, or muon for the matrices of attention and MLP and adamw for the rest."""
    learning_rate: float = 1e-4
    """Learning rate of bases and shared parameters, after the warm-up; with muon, of matrices."""
    adamw_learning_rate: float | None = None
    """Learning rate of what muon leaves to adamw; a quarter of muon's if not given."""
    shared_learning_rate: float | None = None
    """Learning rate of all parameters that are not mixed, in place of the two above."""
    coefficients_learning_rate: float = 1e-2
    """Learning rate of the logits."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and the second moment."""
    eps: float = 1e-8
    """Number added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of bases and shared parameters; the logits have none."""
    warmup_steps: int = 0
    """Number of steps over which the learning rates rise from 0."""
    lr_schedule: str = "constant"
    """Schedule of all learning rates: constant, or cosine, which falls to 0 at the last step."""
    max_grad_norm: float = 1.0
    """Norm of the gradient above which it is scaled down; 0 for never."""
    ema_decay: float = 0.9999
    """Decay rate of the averaged weights, which sampling uses."""
    ema_warmup: bool = True
    """Let the average adapt fast at first: its decay is at most (1 + step) / (10 + step)."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in (
            *("learning_rate", "adamw_learning_rate", "shared_learning_rate"),
            *("coefficients_learning_rate", "eps", "weight_decay", "warmup_steps", "max_grad_norm"),
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
        self._check_algorithm()

    def _check_algorithm(self) -> None:
        """Refuse an unknown algorithm, and a learning rate that it does not have."""
        if self.algorithm not in ("adamw", "muon"):
            raise ValueError(f"algorithm must be adamw or muon, got {self.algorithm!r}")
        if self.algorithm != "muon" and self.adamw_learning_rate is not None:
            raise ValueError(
                "adamw_learning_rate must be left out with adamw, whose rate is learning_rate, got "
                f"{self.adamw_learning_rate}"
            )

    def lr_factor(self, step: int, total_steps: int) -> float:
        """Return the factor of all learning rates at `step` in [0, total_steps)."""
        factor = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.lr_schedule == "cosine":
            progress = (step + 1 - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
            factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
        return factor

    def ema_weight(self, step: int) -> float:
        """Return the share of the new weights in the average after optimizer step `step`."""
        warmed = (1 + step) / (10 + step) if self.ema_warmup else 1.0
        return 1 - min(self.ema_decay, warmed)


def optimizer_of(
    experts: Experts, config: OptimizerConfig, precision: torch.dtype = torch.float32
) -> torch.optim.AdamW:
    """Return the optimizer of a remixed network, with moments of zero.

    Args:
        experts: Experts of the network, whose parameters may be sharded.
        config: Algorithm, learning rates and decay rates.
        precision: Precision of the iteration by which Muon makes matrices orthogonal.
    """
    matrices = matrices_of(experts) if config.algorithm == "muon" else {}
    groups = groups_of(experts, config, matrices)
    options: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "fused": True}
    if matrices:
        optimizer: torch.optim.AdamW = MuonAdamW(groups, matrices, precision, **options)
    else:
        optimizer = torch.optim.AdamW(groups, **options)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = {
                "step": torch.zeros((), device=local(parameter).device),
                "exp_avg": torch.zeros_like(parameter),
            }
            if parameter not in matrices:
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            optimizer.state[parameter] = state
    return optimizer


def groups_of(
    experts: Experts, config: OptimizerConfig, matrices: Mapping[nn.Parameter, str]
) -> list[dict[str, Any]]:
    """Return the groups of trained parameters, one for each learning rate, and the logits' own.

    Args:
        experts: Experts of the network.
        config: Learning rates and weight decay.
        matrices: What Muon moves; nothing if AdamW moves all.
    """
    mixed = {id(parameter) for parameter in experts.bases().values()}
    quarter = config.learning_rate / 4  # measured on CIFAR-10, docs/log.md
    beside = quarter if config.adamw_learning_rate is None else config.adamw_learning_rate

    def rate_of(parameter: nn.Parameter) -> float:
        if config.shared_learning_rate is not None and id(parameter) not in mixed:
            return config.shared_learning_rate
        return beside if matrices and parameter not in matrices else config.learning_rate

    by_rate: dict[float, list[nn.Parameter]] = {}
    for parameter in experts.network.parameters():
        if parameter.requires_grad and parameter is not experts.logits:
            by_rate.setdefault(rate_of(parameter), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "weight_decay": config.weight_decay}
        for rate, parameters in by_rate.items()
    ]
    if experts.logits.requires_grad:
        rate = config.coefficients_learning_rate
        groups.append({"params": [experts.logits], "lr": rate, "weight_decay": 0.0})
    for group in groups:
        group["initial_lr"] = group["lr"]
    return groups


def matrices_of(experts: Experts) -> dict[nn.Parameter, str]:
    """Return the matrices of attention and MLP, mixed or not, with their names."""
    patterns, mixed = patterns_of("attention+mlp"), experts.mixed_names()
    return {
        parameter: name
        for name, parameter in experts.network.named_parameters()
        if matches(name, patterns)
        and name.endswith(".weight")
        and parameter.dim() == (3 if name in mixed else 2)
    }


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply the learning rates that the groups began with by a factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


@torch.no_grad()
def clip(weights: Sequence[nn.Parameter], logits: nn.Parameter, limit: float) -> Tensor:
    """Scale all gradients so that the norm of those of the weights is at most `limit`.

    If the norm is not finite, neither are the gradients afterwards: the step has to be skipped.

    Args:
        weights: Bases and shared parameters; they alone decide the norm, unless all are frozen.
        logits: Table that is scaled like the weights.
        limit: Largest norm; 0 for no limit.

    Returns:
        The norm before clipping, a scalar, without synchronising with the GPU.
    """
    every = [parameter for parameter in (*weights, logits) if parameter.grad is not None]
    deciding = [p.grad for p in weights if p.grad is not None]
    if not deciding and logits.grad is not None:
        deciding = [logits.grad]
    norm = whole(get_total_norm(deciding, foreach=True))
    # Within the limit the stock function multiplies by 1; on a GPU, testing that would wait for it.
    if limit and (norm.device.type != "cpu" or not norm + 1e-6 <= limit):
        clip_grads_with_norm_(every, limit, norm, foreach=True)
    return norm


def step_if(good: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take a step of a fused optimizer, or leave weights, moments and counts as they are.

    Args:
        good: Whether to take it, a scalar on the device that nobody waits for.
        optimizer: AdamW, fused.
    """
    # The kernel reads it before it writes anything; a gradient scaler sets it in the same way.
    optimizer.found_inf = good.logical_not().float()  # type: ignore[attr-defined]
    optimizer.step()


def gradients_of_logits(experts: Experts, strength: float) -> tuple[Tensor, Tensor]:
    """Add the prior's gradient to that of the logits; return the norms of both.

    Args:
        experts: Experts whose logits have the gradient of the task, clipped.
        strength: Weight of the prior, gamma.

    Returns:
        The norms of the task's and of the prior's gradient, scalars.
    """
    logits = experts.logits
    if logits.grad is None:
        nothing = torch.zeros((), device=local(logits).device)
        return nothing, nothing
    task = whole(logits.grad).norm()
    if not strength:
        return task, torch.zeros_like(task)
    values = whole(logits.detach()).requires_grad_()
    loss = strength * experts.prior_loss(values).mean()
    (prior,) = torch.autograd.grad(loss, values)
    local(logits.grad).add_(sharded_like(prior, logits))
    return task, prior.norm()
