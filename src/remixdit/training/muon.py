"""Muon beside AdamW: matrices move by the orthogonalised momentum of their gradients.

    momentum  = lerp(gradient, momentum, 0.95)
    direction = lerp(gradient, momentum, 0.95)
    weight   -= lr 0.2 sqrt(max(O, I)) orthogonal(direction)

where orthogonal(U S V^T) = U V^T, by five steps of Newton-Schulz (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon). The factor gives an update the size that AdamW's usually
has, so learning rates of matrices carry over (arXiv:2502.16982).

`torch.optim.Muon` does the same for parameters of two dimensions. Here each of K bases (K, O, I) is
a matrix, a fused qkv weight is three, and equal shapes of all layers run as one batch, of which
each of several processes makes its share orthogonal. All other parameters, and the biases, are
AdamW's.

Shapes: K bases, O out, I in, n matrices of equal shape.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from remixdit import distributed

__all__ = ["MuonAdamW", "matrix_shape", "orthogonal", "orthogonal_flops"]

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # torch.optim.Muon's
NUM_ITERATIONS = 5


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but for some matrices, which Muon moves.

    Args:
        groups: Groups of parameters, as AdamW takes them.
        matrices: Names of the parameters (K, O, I) or (O, I) that Muon moves.
        dtype: Precision of the iteration.
        **options: Options of AdamW.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        matrices: dict[nn.Parameter, str],
        dtype: torch.dtype,
        **options: Any,
    ) -> None:
        super().__init__(groups, **options)
        self.dtype = dtype
        self.shapes: dict[tuple[int, int], list[tuple[nn.Parameter, dict[str, Any]]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in matrices:
                    shape = matrix_shape(matrices[parameter], parameter.shape)
                    self.shapes.setdefault(shape, []).append((parameter, group))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move the matrices by Muon, unless the step is skipped, and the rest by AdamW."""
        skipped = getattr(self, "found_inf", None)
        on_cpu = skipped is not None and skipped.device.type == "cpu"  # nothing to wait for
        for shape, members in self.shapes.items():
            trained = [member for member in members if member[0].grad is not None]
            if trained and not (on_cpu and skipped):
                self._move(shape, trained, None if on_cpu else skipped)
            for parameter, _ in trained:
                parameter.grad = None  # AdamW leaves it alone
        super().step(closure)

    def _move(
        self,
        shape: tuple[int, int],
        members: list[tuple[nn.Parameter, dict[str, Any]]],
        skipped: Tensor | None,
    ) -> None:
        """Move the parameters whose matrices are of one shape.

        Args:
            shape: (O, I) of a matrix.
            members: Parameters, which have gradients, with their groups.
            skipped: 1 if the step is left out, on the device, else 0; None for 0.
        """
        directions = []
        for parameter, _ in members:
            momentum, gradient = self.state[parameter]["exp_avg"], parameter.grad
            assert gradient is not None
            if skipped is not None:  # not multiplied by 0, which leaves NaN as it is
                gradient = torch.where(skipped == 0, gradient, momentum)
            momentum.lerp_(gradient, 1 - MOMENTUM)
            direction = gradient.lerp_(momentum, MOMENTUM)  # nobody reads the gradient again
            directions.append(direction.view(-1, *shape).to(self.dtype))
        orthogonalise = partial(orthogonal, dtype=self.dtype)
        moves = distributed.by_shares(orthogonalise, torch.cat(directions))
        taken = 1 if skipped is None else 1 - skipped
        parts = torch.split(moves, [len(part) for part in directions])
        for (parameter, group), move in zip(members, parts, strict=True):
            rate = group["lr"]
            self.state[parameter]["step"] += taken
            if group["weight_decay"]:
                parameter.mul_(1 - rate * group["weight_decay"] * taken)
            size = rate * 0.2 * max(shape) ** 0.5
            if skipped is None:
                parameter.sub_(move.view(parameter.shape), alpha=size)
            else:
                parameter.sub_(move.view(parameter.shape).to(parameter.dtype) * (size * taken))


def matrix_shape(name: str, shape: Sequence[int]) -> tuple[int, int]:
    """Return (O, I) of the matrices of a parameter, of which a fused qkv weight has three."""
    *_, rows, columns = shape
    return (rows // 3 if "qkv" in name and rows == 3 * columns else rows), columns


def orthogonal(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the nearest semi-orthogonal matrices, about: singular values of 0.7 to 1.2.

    Args:
        matrices: (n, O, I).
        dtype: Precision of the iteration, and of the result.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    found = (matrices.mT if is_tall else matrices).to(dtype)
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NUM_ITERATIONS):
        square = torch.bmm(found, found.mT)
        square = torch.baddbmm(square, square, square, beta=b, alpha=c)
        found = torch.baddbmm(found, square, found, beta=a)
    return found.mT if is_tall else found


def orthogonal_flops(shape: tuple[int, int]) -> int:
    """Return the operations of `orthogonal` of one matrix (O, I)."""
    short, long = sorted(shape)
    return NUM_ITERATIONS * (2 * 2 * short * short * long + 2 * short**3)
