"""Several experts in one pass of the network.

Small networks spend their time on launching operations, not on arithmetic, so M forwards of a
Mth of the batch cost far more than one of all. Here the weights of the M experts of a step stand
stacked, and every linear of the network becomes a batched product over them. All else that the
network does is the same for every expert and sees one batch. The network is not changed: what it
asks of its mixed parameters is answered for the stack instead.

Images are sorted by expert, and where M does not divide their number some experts have one more. On
one process, with t tokens an image:

    experts   0 ... r - 1 with e + 1 images each;     r ... M - 1 with e
    products  (r, (e + 1) t, in) @ (r, in, out);      (M - r, e t, in) @ (M - r, in, out)

On the way back the M gradients of a parameter are handed to `StepGradients` as soon as they are
there, while the cache holds them: it folds them into those of K bases, and they are gone.

It costs the memory of M networks: the largest take their experts in turn.

Shapes: M experts of a step, B images, * = one parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from remixdit.first.mixing import Mixture
from remixdit.first.segments import Segment
from remixdit.first.step_gradients import StepGradients

__all__ = ["ExpertStack", "Order", "stacks"]

# Mixed parameters of all experts of a step up to which they stand stacked: 4 GB in bfloat16. It is
# B/2 with 20 experts.
MAX_STACKED = 2_000_000_000


def stacks(mixture: Mixture, experts_per_step: int) -> bool:
    """Whether a step should run its experts in one pass."""
    size = sum(len(segment.weights) for segment in mixture.segments if segment.is_mixed)
    return experts_per_step > 1 and experts_per_step * size <= MAX_STACKED


class Group(NamedTuple):
    """Neighbouring experts that have as many images each."""

    experts: slice
    """Of [0, M)."""
    rows: slice
    """Of the sorted images."""


class Order(NamedTuple):
    """How the images of a process are sorted by expert."""

    rows: Tensor
    """(B,) places of the images, expert by expert."""
    experts: Tensor
    """(B,) the expert of each sorted image, in [0, M)."""
    groups: tuple[Group, ...]
    """At most three, in order; all experts and all images are in them."""

    @classmethod
    def of(cls, first: int, count: int, num_experts: int, device: torch.device) -> "Order":
        """Sort images first..first + count, of which image i belongs to expert i mod M."""
        experts = (first + torch.arange(count, device=device)) % num_experts
        experts, rows = experts.sort(stable=True)
        each, more = divmod(count, num_experts)
        # The experts that have one more follow each other, maybe around the end.
        begin, end = first % num_experts, (first + more) % num_experts
        cuts = sorted({0, begin, end, num_experts})
        groups, taken = [], 0
        for start, stop in pairwise(cuts):
            has_more = (start - begin) % num_experts < more
            size = (stop - start) * (each + has_more)
            groups.append(Group(slice(start, stop), slice(taken, taken + size)))
            taken += size
        return cls(rows, experts, tuple(groups))


class ExpertStack:
    """The weights of the M experts of a step.

    Args:
        gradients: Take in those of the mixture.
        experts_per_step: M.
    """

    def __init__(self, gradients: StepGradients, experts_per_step: int) -> None:
        self.gradients, self.experts_per_step = gradients, experts_per_step
        self.mixed = [segment for segment in gradients.segments if segment.is_mixed]
        self.leaves = [segment.stacked(experts_per_step) for segment in self.mixed]
        for segment, leaves in zip(self.mixed, self.leaves, strict=True):
            for i, leaf in enumerate(leaves):
                # The hook must not know the stack: such a cycle would never be freed.
                hook = partial(hand_over, gradients, segment, i)
                leaf.requires_grad_().register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def begin_step(self, experts: Sequence[int]) -> None:
        """Mix the M experts and make ready for their gradients."""
        self.gradients.begin_stacked_step(experts)
        for segment, leaves in zip(self.mixed, self.leaves, strict=True):
            segment.mix_rows(self.gradients.expert_rows(segment), leaves)

    def end_step(self) -> None:
        """Complete the gradients, when back-propagation has ended."""
        for segment in self.mixed:
            segment.clear_rest()

    def __call__(self, order: Order, *inputs: Tensor) -> Tensor:
        """Run every expert on its own images, sorted by `order`: (B, ...) => (B, C, H, W)."""
        table: dict[int, Tensor] = {}
        for segment, leaves in zip(self.mixed, self.leaves, strict=True):
            ids = (id(parameter) for parameter in segment.parameters)
            table.update(zip(ids, leaves, strict=True))
        with StackedParameters(table, order):
            return self.gradients.mixture.network(*inputs)


def hand_over(gradients: StepGradients, segment: Segment, place: int, leaf: Tensor) -> None:
    """Pass the gradients of one parameter on; back-propagation calls it."""
    assert leaf.grad is not None
    gradients.collect_stacked(segment, place, leaf.grad)
    leaf.grad = None


class StackedParameters(TorchFunctionMode):
    """Answers what a network asks of its mixed parameters for all experts at once.

    Args:
        table: Stacks by the id of the parameter that they stand for.
        order: Of the images.
    """

    def __init__(self, table: Mapping[int, Tensor], order: Order) -> None:
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
            biased = len(args) > 2 and args[2] is not None
            if len(own) != 1 + biased or kwargs:
                raise NotImplementedError("stacked experts need a linear's weight and bias mixed")
            bias = own[1] if biased else None
            return GroupedLinear.apply(args[0], own[0], bias, self.order)  # type: ignore[no-untyped-call]
        if func is F.embedding:
            return own[0][self.order.experts, args[0]]
        if func is torch.Tensor.flatten and args[1:] == (1,):
            flat = func(*args)
            self.derived.append(flat)
            self.table[id(flat)] = own[0].flatten(2)
            return flat
        raise NotImplementedError(f"stacked experts do not know {func}")


class GroupedLinear(torch.autograd.Function):
    """A linear whose weights depend on the expert: one batched product for each group."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        inputs: Tensor,  # (B, ..., in)
        weight: Tensor,  # (M, out, in)
        bias: Tensor | None,  # (M, out)
        order: Order,
    ) -> Tensor:
        """Return (B, ..., out)."""
        inputs = inputs.contiguous()
        outputs = inputs.new_empty(*inputs.shape[:-1], weight.shape[1])
        for group in order.groups:
            x, y = (by_expert(values, group) for values in (inputs, outputs))
            torch.bmm(x, weight[group.experts].transpose(1, 2), out=y)
            if bias is not None:
                y.add_(bias[group.experts, None])
        ctx.save_for_backward(inputs, weight)
        ctx.order = order  # type: ignore[attr-defined]
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of inputs, weight and bias."""
        inputs, weight = ctx.saved_tensors
        needs_inputs, _, has_bias, _ = ctx.needs_input_grad
        grad = grads[0].contiguous()
        input_grad = torch.empty_like(inputs) if needs_inputs else None
        weight_grad = torch.empty_like(weight)
        bias_grad = weight.new_empty(weight.shape[:2]) if has_bias else None
        for group in ctx.order.groups:
            experts = group.experts
            x, g = (by_expert(values, group) for values in (inputs, grad))
            torch.bmm(g.transpose(1, 2), x, out=weight_grad[experts])
            if bias_grad is not None:
                torch.sum(g, 1, out=bias_grad[experts])
            if input_grad is not None:
                torch.bmm(g, weight[experts], out=by_expert(input_grad, group))
        return input_grad, weight_grad, bias_grad, None


def by_expert(values: Tensor, group: Group) -> Tensor:
    """Return what a group has of (B, ..., D), as (experts, rows, D)."""
    count = group.experts.stop - group.experts.start
    own = values[group.rows]
    return own.view(count, own.numel() // (count * values.shape[-1]), values.shape[-1])
