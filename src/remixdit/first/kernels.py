"""The passes over the bases: mix, inner products, fold, update. Pure functions of flat tensors.

They move K times the memory of a plain network's optimizer and compute next to nothing, so what
counts is how often they read and write. Compiled, each is one kernel without a temporary of K
arrays; eager, they work chunk by chunk, so that temporaries stay in the cache.

Shapes: K bases, P numbers of a segment, R plain gradients, M mixtures.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["AdamW", "adamw_step", "compiled", "fold", "inner_products", "mix", "mix_rows", "update"]

# Elements of one array that an eager pass works on at a time: on a CPU few enough to stay in the
# cache and enough for two threads; on a GPU enough to fill it.
CPU_CHUNK, GPU_CHUNK = 2**18, 2**24


class AdamW(NamedTuple):
    """The numbers of one step: floats, or for compiled code tensors, lest a change recompile.

    Bias corrections are ready-made: inside they would be evaluated for every element.
    """

    step_size: float | Tensor  # lr / (1 - beta1^t)
    weight1: float | Tensor  # 1 - beta1
    beta2: float | Tensor
    weight2: float | Tensor  # 1 - beta2
    root: float | Tensor  # sqrt(1 - beta2^t)
    eps: float | Tensor
    keep: float | Tensor  # 1 - lr * weight_decay
    ema_weight: float | Tensor  # share of the weights before this step in their average


def mix(bases: Tensor, coefficients: Tensor, out: Tensor) -> None:
    """Write sum_k coefficients[k] * bases[k] to `out` (P,), in its dtype; bases is (K, P)."""
    if out.dtype == bases.dtype and not torch.compiler.is_compiling():
        torch.mv(bases.t(), coefficients, out=out)
    else:
        out.copy_((coefficients[:, None] * bases).sum(0))


def mix_rows(bases: Tensor, coefficients: Tensor, out: Tensor) -> None:
    """Write M mixtures to `out` (M, P), in its dtype; bases is (K, P), coefficients (M, K)."""
    for part in chunks(bases, len(out)):
        out[:, part] = coefficients @ bases[:, part]


def inner_products(bases: Tensor, grads: Tensor) -> Tensor:
    """Return (R, K) inner products of the gradients (R, P) with the bases (K, P)."""
    products = bases.new_zeros(len(bases), len(grads))  # its transpose takes twice the time
    for part in chunks(bases, len(grads)):
        products.addmm_(bases[:, part], grads[:, part].to(bases.dtype).t())
    return products.t()


def fold(bases: Tensor, grads: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """Turn M plain gradients into those of K bases, and hold them against the bases, in one pass.

    Args:
        bases: (K, P).
        grads: (M, P).
        weights: (M, K) of the gradients in those of the bases.
        out: (K, P) gradients of the bases, written.

    Returns:
        (M, K) inner products of the gradients with the bases.
    """
    products = bases.new_zeros(len(bases), len(grads))
    for part in chunks(bases, len(grads)):
        own = grads[:, part].to(bases.dtype)
        torch.mm(weights.t(), own, out=out[:, part])
        products.addmm_(bases[:, part], own.t())
    return products.t()


def adamw_step(
    bases: Tensor,  # (K, P)  updated in place
    grads: Tensor,  # (R, P)  plain gradients
    weights: Tensor,  # (R, K)  of the gradients in those of the bases
    exp_avg: Tensor,  # (K, P)  first moment, updated in place
    exp_avg_sq: Tensor,  # (K, P)  second moment, updated in place
    ema: Tensor,  # (K, P)  averaged bases, updated in place
    numbers: AdamW,
) -> None:
    """Take one AdamW step with the K bases of a segment (arXiv 1711.05101).

    Basis k has the gradient sum_r weights[r, k] * grads[r], which is never stored. The average
    takes in the weights from before the step: what is written last cannot be read again without
    keeping a copy of all K bases.
    """
    step_size, weight1, beta2, weight2, root, eps, keep, ema_weight = numbers
    grads = grads.to(bases.dtype)
    basis_grads = weights.t() * grads if len(grads) == 1 else weights.t() @ grads  # (K, P)
    ema.lerp_(bases, ema_weight)
    exp_avg.lerp_(basis_grads, weight1)
    if isinstance(weight2, Tensor) or isinstance(step_size, Tensor):  # as addcmul takes floats only
        exp_avg_sq.mul_(beta2).add_(weight2 * basis_grads * basis_grads)
        bases.mul_(keep).sub_(step_size * exp_avg / (exp_avg_sq.sqrt() / root + eps))
    else:  # the operations of torch.optim.AdamW, to be equal to it bit for bit
        exp_avg_sq.mul_(beta2).addcmul_(basis_grads, basis_grads, value=weight2)
        bases.mul_(keep)
        bases.addcdiv_(exp_avg, exp_avg_sq.sqrt().div_(root).add_(eps), value=-step_size)


def update(
    arrays: tuple[Tensor, Tensor, Tensor, Tensor],
    grads: Tensor,
    weights: Tensor,
    numbers: AdamW,
    compile: bool,
) -> None:
    """Take one step with bases, moments and average, all (K, P), compiled or chunk by chunk."""
    bases, exp_avg, exp_avg_sq, ema = arrays
    if compile:
        on_device = torch.tensor(numbers, dtype=bases.dtype).to(bases.device, non_blocking=True)
        scalars = AdamW(*on_device.unbind())
        compiled(adamw_step)(bases, grads, weights, exp_avg, exp_avg_sq, ema, scalars)
        return
    for part in chunks(bases, len(grads)):
        cut = (values[:, part] for values in (bases, grads, exp_avg, exp_avg_sq, ema))
        values, grad, first, second, average = cut
        adamw_step(values, grad, weights, first, second, average, numbers)


def chunks(bases: Tensor, rows: int) -> Iterator[slice]:
    """Cut P so that a chunk of all K bases, and of so many other rows, suits the device."""
    size = max(1, (GPU_CHUNK if bases.is_cuda else CPU_CHUNK) // max(rows, len(bases)))
    for start in range(0, bases.shape[1], size):
        yield slice(start, start + size)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel, once in the life of the process and again for each shape."""
    return torch.compile(function, dynamic=False)
