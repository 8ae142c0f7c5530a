"""Several experts in one pass of the network.

Small networks spend their time on launching operations, not on arithmetic, so M forwards of a
Mth of the batch cost far more than one of all. Here the weights of the M experts of a step stand
stacked, and every linear of the network becomes a batched product over them. All else that the
network does is the same for every expert and sees one batch. The network is not changed: what it
asks of its mixed parameters is answered for the stack instead.

Images are sorted so that no padding is needed where M does not divide their number:

    rows      of expert 0, 1, ..., M - 1, as many of each;  then one more of some experts
    products  (M, rows, in) @ (M, in, out);                 (rest, rows, in) @ (rest, in, out)

It costs the memory of M networks and M gradients: the largest take their experts in turn.

Shapes: M experts of a step, B images, P numbers of a segment, * = one parameter.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from remixdit.mixing import Mixture

__all__ = ["ExpertStack", "Order", "stacks"]

# Mixed parameters of all experts of a step up to which they stand stacked: with their gradients
# 8 GB in bfloat16. It is B/2 with 20 experts, whose gradients would otherwise be folded into those
# of the bases 20 times.
MAX_STACKED = 2_000_000_000


def stacks(mixture: Mixture, experts_per_step: int) -> bool:
    """Whether a step should run its experts in one pass."""
    size = sum(len(segment.weights) for segment in mixture.segments if segment.is_mixed)
    return experts_per_step > 1 and experts_per_step * size <= MAX_STACKED


class Order(NamedTuple):
    """How the images of a process are sorted by expert."""

    rows: Tensor
    """(B,) places of the images: as many of every expert, expert by expert, then the rest."""
    each: int
    """Images that every expert has."""
    rest: Tensor
    """Experts, in [0, M), that have one more."""

    @classmethod
    def of(cls, first: int, count: int, num_experts: int, device: torch.device) -> "Order":
        """Sort images first..first + count, of which image i belongs to expert i mod M."""
        each = count // num_experts
        starts = (torch.arange(num_experts, device=device) - first) % num_experts
        even = starts[:, None] + num_experts * torch.arange(each, device=device)  # (M, each)
        odd = torch.arange(each * num_experts, count, device=device)
        return cls(torch.cat([even.flatten(), odd]), each, (first + odd) % num_experts)

    def experts(self, num_experts: int) -> Tensor:
        """Return (B,) the expert of each sorted image."""
        even = torch.arange(num_experts, device=self.rest.device).repeat_interleave(self.each)
        return torch.cat([even, self.rest])


class Stacked(NamedTuple):
    """One mixed parameter of all experts of a step."""

    values: Tensor
    """(M, *), a leaf."""
    grad: Tensor
    """(M, *), where its gradient goes."""


class ExpertStack:
    """The weights and gradients of the M experts of a step.

    Args:
        mixture: Its gradients are collected as if the experts had run in turn.
        experts_per_step: M.
    """

    def __init__(self, mixture: Mixture, experts_per_step: int) -> None:
        self.mixture, self.experts_per_step = mixture, experts_per_step
        self.mixed = [segment for segment in mixture.segments if segment.is_mixed]
        self.weights = [s.weights.new_empty(experts_per_step, len(s.weights)) for s in self.mixed]
        # Rows of a flat buffer are not dense, which autograd fears is slow. It is not.
        warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout")
        self.leaves: list[Tensor] = []  # (M, *), each a view of its segment's weights
        for segment, weights in zip(self.mixed, self.weights, strict=True):
            self.leaves += [values.requires_grad_() for values in segment.views(weights)]

    @torch.no_grad()
    def begin_step(self, experts: Sequence[int]) -> None:
        """Mix the M experts and make ready for their gradients."""
        self.mixture.begin_stacked_step(experts)
        grads: list[Tensor] = []
        for segment, weights in zip(self.mixed, self.weights, strict=True):
            segment.mix_rows(self.mixture.basis_weights(segment), weights)
            assert segment.grads is not None
            grads += segment.views(segment.grads)
        for leaf, grad in zip(self.leaves, grads, strict=True):
            leaf.grad = grad

    def __call__(self, order: Order, *inputs: Tensor) -> Tensor:
        """Run every expert on its own images, sorted by `order`: (B, ...) => (B, C, H, W)."""
        parameters = (p for segment in self.mixed for p in segment.parameters)
        table = {}
        for parameter, leaf in zip(parameters, self.leaves, strict=True):
            assert leaf.grad is not None
            table[id(parameter)] = Stacked(leaf, leaf.grad)
        with StackedParameters(table, order):
            return self.mixture.network(*inputs)


class StackedParameters(TorchFunctionMode):
    """Answers what a network asks of its mixed parameters for all experts at once.

    Args:
        table: Stacks by the id of the parameter that they stand for.
        order: Of the images.
    """

    def __init__(self, table: Mapping[int, Stacked], order: Order) -> None:
        super().__init__()
        self.table, self.order = dict(table), order
        self.derived: list[Tensor] = []  # kept, so that no other tensor gets their ids

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        own = [self.table[id(arg)] for arg in args if id(arg) in self.table]
        if not own or getattr(func, "__name__", "") == "__get__":  # such as .dtype
            return func(*args, **(kwargs or {}))
        if func is F.linear:
            values = linear_parts(own, args)
            return GroupedLinear.apply(args[0], *values, self.order)  # type: ignore[no-untyped-call]
        if func is F.embedding:
            experts = self.order.experts(len(own[0].values))
            return own[0].values[experts, args[0]]
        if func is torch.Tensor.flatten and args[1:] == (1,):
            flat = func(*args)
            self.derived.append(flat)
            self.table[id(flat)] = Stacked(own[0].values.flatten(2), own[0].grad.flatten(2))
            return flat
        raise NotImplementedError(f"stacked experts do not know {func}")


def linear_parts(own: Sequence[Stacked], args: Sequence[Any]) -> tuple[Any, ...]:
    """Return values and gradients of weight and bias, which are mixed together."""
    biased = len(args) > 2 and args[2] is not None
    if len(own) != 1 + biased:
        raise NotImplementedError("stacked experts need weight and bias of a linear both mixed")
    bias = own[1] if biased else (None, None)
    return own[0].values, own[0].grad, *bias


class GroupedLinear(torch.autograd.Function):
    """A linear whose weights depend on the expert; gradients go straight to where they stay."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        inputs: Tensor,  # (B, ..., in)
        weight: Tensor,  # (M, out, in)
        weight_grad: Tensor,  # (M, out, in)
        bias: Tensor | None,  # (M, out)
        bias_grad: Tensor | None,  # (M, out)
        order: Order,
    ) -> Tensor:
        """Return (B, ..., out)."""
        outputs = inputs.new_empty(*inputs.shape[:-1], weight.shape[1])
        parts = (split_rows(values, order, len(weight)) for values in (inputs, outputs))
        for x, y, pick in zip(*parts, picks(order), strict=True):
            if pick is None:
                continue
            torch.bmm(x, weight[pick].transpose(1, 2), out=y)
            if bias is not None:
                y.add_(bias[pick][:, None])
        ctx.save_for_backward(inputs, weight)
        ctx.grads, ctx.order = (weight_grad, bias_grad), order  # type: ignore[attr-defined]
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Add to the gradients of weight and bias; return that of the inputs."""
        inputs, weight = ctx.saved_tensors
        weight_grad, bias_grad = ctx.grads
        grad = grads[0].contiguous()
        needed = ctx.needs_input_grad[0]
        input_grad = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        parts = (split_rows(t, ctx.order, len(weight)) for t in (inputs, grad, input_grad))
        for x, g, x_grad, pick in zip(*parts, picks(ctx.order), strict=True):
            if pick is None:
                continue
            if isinstance(pick, slice):
                weight_grad.baddbmm_(g.transpose(1, 2), x)
            else:
                weight_grad[pick] += torch.bmm(g.transpose(1, 2), x)
            if bias_grad is not None:
                bias_grad[pick] += g.sum(1)
            if needed:
                torch.bmm(g, weight[pick], out=x_grad)
        return input_grad if needed else None, None, None, None, None, None


def split_rows(values: Tensor, order: Order, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return what every expert has, (M, rows, D), and what some have more, (rest, rows, D)."""
    images = num_experts * order.each
    even, rest = values[:images], values[images:]
    width = values.shape[-1]
    rows = values[0].numel() // width
    return even.reshape(num_experts, -1, width), rest.reshape(-1, rows, width)


def picks(order: Order) -> tuple[slice | None, Tensor | None]:
    """Return which experts take part in the two products, None where there is nothing."""
    return slice(None) if order.each else None, order.rest if len(order.rest) else None
