"""Flat storage for parameters that are mixed alike.

All parameters of one kind live end to end in one flat buffer, a `Segment`, and the network's own
parameters are views of it. So mixing is one matrix product, and an update of the bases one pass
over memory, however many layers the network has.

Shapes: K bases, P numbers of a segment (padding included), R gradients that are kept,
* = the shape of one parameter of the network.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from remixdit import kernels

__all__ = ["Segment"]

# Views of a flat buffer start at multiples of this many elements, for aligned vector loads.
ALIGNMENT = 64
FOLDED_AT_ONCE = 2**20  # numbers of a gradient: the result of each product is temporary


class Segment:
    """Parameters that are mixed alike, laid end to end in flat buffers.

    Attributes:
        names: Of the parameters, in order.
        table: Index of their coefficient table, or None for shared parameters (K = 1).
        bases: (K, P) master weights, float32 or wider.
        weights: (P,) the storage of the network's parameters; bases[0] itself where that serves.
        grads: (R, P) plain gradients, or None outside of training.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        table: int | None,
        num_bases: int,
        constant: bool,
    ) -> None:
        self.names = list(parameters)
        self.table = table
        self.constant = constant  # the one coefficient is 1, always
        self.parameters = list(parameters.values())
        self.shapes = [parameter.shape for parameter in self.parameters]
        sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in self.parameters]
        self.offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        first = self.parameters[0]
        master = torch.promote_types(first.dtype, torch.float32)
        self.bases = torch.zeros(num_bases, sum(sizes), dtype=master, device=first.device)
        for values, parameter in zip(self.views(self.bases), self.parameters, strict=True):
            values.copy_(parameter.detach())
        self.grads: Tensor | None = None
        self.scratch: Tensor | None = None
        self._grads_storage: Tensor | None = None
        self.cast(first.dtype)

    @property
    def num_bases(self) -> int:
        """K, or 1 for shared parameters."""
        return self.bases.shape[0]

    @property
    def is_mixed(self) -> bool:
        """Whether the parameters have a coefficient table."""
        return self.table is not None

    @property
    def is_aliased(self) -> bool:
        """Whether the network's parameters are the one basis itself."""
        return self.weights.data_ptr() == self.bases.data_ptr()

    def views(self, flat: Tensor) -> list[Tensor]:
        """Cut a flat (..., P) tensor into the parameters: a list of (..., *) views."""
        pairs = zip(self.offsets, self.shapes, strict=True)
        return [
            flat[..., offset : offset + shape.numel()].view((*flat.shape[:-1], *shape))
            for offset, shape in pairs
        ]

    def cast(self, dtype: torch.dtype) -> None:
        """Let the network hold its weights in `dtype`; the bases keep theirs."""
        self.weights = self.bases[0]
        if not (self.constant and dtype == self.bases.dtype):
            self.weights = self.bases[0].to(dtype, copy=True)
        self._written = self.bases._version
        self.grads = self.scratch = self._grads_storage = None
        self._attach()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move every buffer by `fn`, such as a change of device."""
        aliased = self.is_aliased
        self.bases = fn(self.bases)
        self.weights = self.bases[0] if aliased else fn(self.weights)
        self.grads = self.scratch = self._grads_storage = None
        self._written = -1
        self._attach()

    def mix(self, coefficients: Tensor) -> None:
        """Write sum_k coefficients[k] * bases[k] into the network; coefficients is (K,)."""
        if self.constant:
            self.refresh()
        elif self.weights.is_cuda:
            kernels.compiled(kernels.mix)(self.bases, coefficients, self.weights)
        else:
            kernels.mix(self.bases, coefficients, self.weights)

    def refresh(self) -> None:
        """Write the one basis into the network, if it has changed."""
        if not self.is_aliased and self._written != self.bases._version:
            self.weights.copy_(self.bases[0])
            self._written = self.bases._version

    def prepare_grads(self, rows: int, direct: bool) -> None:
        """Allocate `rows` gradients; unless `direct`, the network writes to a scratch one."""
        master, size = self.bases.dtype, self.bases.shape[1]
        dtype = self.weights.dtype if direct else master
        kept = self._grads_storage
        fits = kept is not None and kept.shape[0] == rows and kept.dtype == dtype
        if not fits or (self.scratch is None) != direct:
            self._grads_storage = self.weights.new_zeros(rows, size, dtype=dtype)
            self.scratch = None if direct else self.weights.new_zeros(size)
        self.grads = self._grads_storage
        self.point_grads(0)

    def point_grads(self, row: int) -> None:
        """Let back-propagation write to one row of the gradients (or to the scratch one)."""
        assert self.grads is not None
        target = self.grads[row] if self.scratch is None else self.scratch
        for parameter, grad in zip(self.parameters, self.views(target), strict=True):
            parameter.grad = grad

    def fold_grads(self, weights: Tensor) -> None:
        """Turn R plain gradients into those of K < R bases, in place; weights is (R, K)."""
        assert self.grads is not None
        mix = weights.t().to(self.grads.dtype)
        for part in torch.split(self.grads, FOLDED_AT_ONCE, 1):
            part[: len(mix)] = mix @ part
        self.grads = self.grads[: len(mix)]

    def _attach(self) -> None:
        """Make the network's parameters views of `weights`."""
        for parameter, values in zip(self.parameters, self.views(self.weights), strict=True):
            parameter.data = values
            parameter.grad = None
