"""The product of grouped rows with mixed weights, and its backward pass.

    weights[m] = sum_k coefficients[m, k] bases[k]
    outputs[m] = inputs[m] @ weights[m]^T + bias[m]

Saved for the backward pass are inputs, bases and coefficients only. There the weights are mixed
again, and

    basis_grads = coefficients^T @ weight_grads,    coefficient_grads = <weight_grads, bases>

so the weights of M experts exist for one layer at a time, at any M.

Shapes: K bases, M experts of a batch of B images, R rows an image, I in, O out.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["MixedProduct", "Span", "mix"]

# (experts, images of each): neighbouring experts that have as many images each.
Span = tuple[int, int]


class MixedProduct(torch.autograd.Function):
    """(B, R, I) inputs, sorted by expert => (B, R, O) outputs.

    Args:
        inputs: (B, R, I), in the dtype of the arithmetic.
        bases: (K, O, I) float32 or wider.
        biases: (K, O), or None.
        coefficients: (M, K).
        spans: How many images the M experts have, in order.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        inputs: Tensor,
        bases: Tensor,
        biases: Tensor | None,
        coefficients: Tensor,
        spans: tuple[Span, ...],
    ) -> Tensor:
        ctx.spans = spans
        ctx.save_for_backward(inputs, bases, biases, coefficients)
        weights = mix(bases, coefficients, inputs.dtype).transpose(1, 2)  # (M, I, O)
        bias = None if biases is None else (coefficients @ biases).to(inputs.dtype)  # (M, O)
        outputs = []
        for rows, place in grouped(inputs, spans):
            if bias is None:
                outputs.append(torch.bmm(rows, weights[place]))
            elif len(rows) == 1:
                outputs.append(torch.addmm(bias[place][0], rows[0], weights[place][0]))
            else:
                outputs.append(torch.baddbmm(bias[place][:, None], rows, weights[place]))
        return joined(outputs, inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        inputs, bases, biases, coefficients = ctx.saved_tensors
        grads = grads.to(inputs.dtype).contiguous()
        # Autocast, if it is on here, would round bases, coefficients and the gradients' sums.
        with torch.autocast(grads.device.type, enabled=False):
            input_grads = None
            if ctx.needs_input_grad[0]:
                input_grads = times(grads, mix(bases, coefficients, inputs.dtype), ctx.spans)
            pairs = zip(grouped(grads, ctx.spans), grouped(inputs, ctx.spans), strict=True)
            weight_grads = together([torch.bmm(g.transpose(1, 2), x) for (g, _), (x, _) in pairs])
            learns = ctx.needs_input_grad[1]
            basis_grads, coefficient_grads = folded(weight_grads, bases, coefficients, learns)
            bias_grads = None
            if biases is not None:
                sums = together([g.sum(1) for g, _ in grouped(grads, ctx.spans)]).to(biases.dtype)
                if ctx.needs_input_grad[2]:
                    bias_grads = coefficients.t() @ sums
                coefficient_grads = coefficient_grads + sums @ biases.t()
        return input_grads, basis_grads, bias_grads, coefficient_grads, None


def times(images: Tensor, weights: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """Return (B, R, O) images times the (M, O, I) weights of their experts: (B, R, I)."""
    products = [torch.bmm(rows, weights[place]) for rows, place in grouped(images, spans)]
    return joined(products, images)


def grouped(images: Tensor, spans: tuple[Span, ...]) -> list[tuple[Tensor, slice]]:
    """Return the rows (experts, images R, *) of each span of (B, R, *), and its place in M."""
    parts, start, first = [], 0, 0
    for experts, size in spans:
        rows = images[start : start + experts * size].reshape(experts, -1, images.shape[-1])
        parts.append((rows, slice(first, first + experts)))
        start, first = start + experts * size, first + experts
    return parts


def joined(parts: list[Tensor], images: Tensor) -> Tensor:
    """Return the groups as images again: (B, R, *)."""
    return together([part.view(-1, images.shape[1], part.shape[-1]) for part in parts])


def together(parts: list[Tensor]) -> Tensor:
    """Return the parts one after the other, without a copy if there is but one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def mix(bases: Tensor, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mixed weights (M, *) in `dtype`, of (K, *) bases and (M, K) coefficients."""
    flat, shape = bases.flatten(1), (len(coefficients), *bases.shape[1:])
    # A few experts are cheaper to mix in float32 and round than K bases are to round first.
    if dtype.itemsize >= flat.itemsize or len(coefficients) <= 2 * len(bases):
        return (coefficients.to(flat.dtype) @ flat).to(dtype).view(shape)
    # Written once, in half of the bytes. Coefficients of 8 bits would scale whole networks by a
    # little, so each is the sum of two.
    high = coefficients.to(dtype)
    low = (coefficients - high).to(dtype)
    flat = flat.to(dtype)
    return (torch.cat([high, low], 1) @ torch.cat([flat, flat])).view(shape)


def folded(
    weight_grads: Tensor, bases: Tensor, coefficients: Tensor, learns: bool
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of the bases, (K, *), if they learn, and of the coefficients, (M, K)."""
    grads = weight_grads.flatten(1).to(bases.dtype)
    coefficient_grads = grads @ bases.flatten(1).t()
    if not learns:  # K matrices that nothing would read
        return None, coefficient_grads
    return (coefficients.t() @ grads).view_as(bases), coefficient_grads
