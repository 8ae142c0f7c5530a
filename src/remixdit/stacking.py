"""Several experts in one pass of the network.

Small networks spend their time on launching operations, not on arithmetic, so M forwards of a
Mth of the batch cost far more than one of all. Here the weights of the M experts of a step stand
stacked, and vmap turns every linear of the network into a batched product: as many operations as
for one expert. The network is not changed and its gradients are those of M separate passes.

It costs the memory of M networks and M gradients: large networks take their experts in turn.

Shapes: M experts of a step, b images an expert, P numbers of a segment, * = one parameter.
"""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from remixdit.mixing import Mixture

__all__ = ["ExpertStack", "stacks"]

# Mixed parameters of one network up to which the memory of M more is no concern.
MAX_PARAMETERS = 50_000_000


def stacks(mixture: Mixture, experts_per_step: int) -> bool:
    """Whether a step should run its experts in one pass."""
    size = sum(len(segment.weights) for segment in mixture.segments if segment.is_mixed)
    return experts_per_step > 1 and size <= MAX_PARAMETERS


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
        self.leaves: dict[str, Tensor] = {}  # (M, *), each a view of its segment's weights
        for segment, weights in zip(self.mixed, self.weights, strict=True):
            for name, values in zip(segment.names, segment.views(weights), strict=True):
                self.leaves[name] = values.requires_grad_()

    @torch.no_grad()
    def begin_step(self, experts: Sequence[int]) -> None:
        """Mix the M experts and make ready for their gradients."""
        self.mixture.begin_stacked_step(experts)
        for segment, weights in zip(self.mixed, self.weights, strict=True):
            segment.mix_rows(self.mixture.basis_weights(segment), weights)
            assert segment.grads is not None
            for name, grad in zip(segment.names, segment.views(segment.grads), strict=True):
                self.leaves[name].grad = grad

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run every expert on its own images: (M, b, ...) inputs => (M, b, C, H, W)."""
        shared = {
            name: parameter
            for name, parameter in self.mixture.network.named_parameters()
            if name not in self.leaves
        }

        def run(weights: dict[str, Tensor], *own: Tensor) -> Tensor:
            return functional_call(self.mixture.network, {**shared, **weights}, own)

        with attention_for(inputs[0].device):
            return vmap(run)(self.leaves, *inputs)


def attention_for(device: torch.device) -> AbstractContextManager[object]:
    """Choose an attention that can be batched over experts: on a CPU the fused one cannot."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
