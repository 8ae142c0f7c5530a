"""Flat storage for parameters that are mixed alike.

All parameters of one kind live end to end in one flat buffer, a `Segment`, and the network's own
parameters are views of it. So mixing is one matrix product, and an update of the bases one pass
over memory, however many layers the network has.

Shapes: K bases, P numbers of a segment (padding included), R gradients that are kept,
* = the shape of one parameter of the network.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from remixdit.first import kernels
from remixdit.first.sharding import Shard

__all__ = ["Segment", "check_same_shapes"]

# Views of a flat buffer start at multiples of this many elements, for aligned vector loads.
ALIGNMENT = 64


class Segment:
    """Parameters that are mixed alike, laid end to end in flat buffers.

    Attributes:
        names: Of the parameters, in order.
        table: Index of their coefficient table, or None for shared parameters (K = 1).
        bases: (K, P) master weights, float32 or wider; this process's slice, if sharded.
        weights: (P,) the storage of the network's parameters; bases[0] itself where that serves.
        grads: (R, P) plain gradients or those of the bases, None outside of training; a slice, if
            sharded.
        sharding: How the bases are shared out over processes, or None.
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
        self.sharding: Shard | None = None
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
        self._unwritten: set[int] = set()  # parameters without a gradient yet in a stacked step
        self.weights: Tensor = self.bases[0]
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

    def part(self, flat: Tensor, place: int) -> Tensor:
        """Return parameter number `place` in a flat (R, P) tensor, flat: (R, p)."""
        offset = self.offsets[place]
        return flat[:, offset : offset + self.shapes[place].numel()]

    def named(self, own: Tensor) -> dict[str, Tensor]:
        """Return the parameters (..., *) in what is kept like the bases.

        They are views; or, if sharded, copies that only the first process has.
        """
        whole = own if self.sharding is None else self.sharding.collected(own)
        return dict(zip(self.names, self.views(whole), strict=True))

    def swap(self, other: Tensor) -> Tensor:
        """Take other bases, (K, P), and return the present ones."""
        if not self.is_aliased:
            self._written = -1  # two tensors may have been written equally often
            self.bases, other = other, self.bases
            return other
        kept = self.bases.clone()  # the network's storage must not move
        self.bases.copy_(other)
        return other.copy_(kept)

    def load(self, own: Tensor, values: Iterable[Tensor]) -> None:
        """Write the parameters (..., *) into what is kept like the bases, (..., P)."""
        whole = own
        if self.sharding is not None:
            whole = own.new_zeros(*own.shape[:-1], len(self.weights), device="cpu")
        for view, value in zip(self.views(whole), values, strict=True):
            view.copy_(value)
        if self.sharding is not None:
            own.copy_(self.sharding.own(whole))

    def shard(self, sharding: Shard) -> None:
        """Keep only this process's slice of the bases; the network stays whole."""
        self.sharding = sharding
        size = self.bases.shape[1]
        stride = ALIGNMENT * sharding.num_ranks
        padding = (0, -(-size // stride) * stride - size)
        self.weights = nn.functional.pad(self.weights, padding)
        self.bases = sharding.own(nn.functional.pad(self.bases, padding)).clone()
        self.grads = self.scratch = self._grads_storage = None
        self._written = -1
        self._attach()

    def cast(self, dtype: torch.dtype) -> None:
        """Let the network hold its weights in `dtype`; the bases keep theirs."""
        if self.sharding is not None:
            self.weights = self.weights.to(dtype)
            self._written = -1
        else:
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

    def show(self, ready: Tensor) -> None:
        """Let the network hold weights (P,) that were mixed before.

        On a CPU it looks at them where they are, until the next mix: to copy them takes as long as
        half a step of a small network. A GPU copies in no time, and what was compiled or captured
        there reads the storage that it knows.
        """
        if ready.is_cuda:
            self.weights.copy_(ready)
        else:
            self._point(ready)

    def mix(self, coefficients: Tensor) -> None:
        """Write sum_k coefficients[k] * bases[k] into the network; coefficients is (K,)."""
        if self._elsewhere:
            self._point(self.weights)
        if self.constant:
            self.refresh()
            return
        mix = kernels.compiled(kernels.mix) if self.weights.is_cuda else kernels.mix
        mix(self.bases, coefficients, self._own(self.weights))
        self._gather(self.weights)

    def stacked(self, count: int) -> list[Tensor]:
        """Return room for M sets of the parameters, (M, *) each: parts of one storage."""
        flat = self.weights.new_empty(count * len(self.weights))
        starts = (count * offset for offset in self.offsets)
        return [
            flat[start : start + count * shape.numel()].view(count, *shape)
            for start, shape in zip(starts, self.shapes, strict=True)
        ]

    def mix_rows(self, coefficients: Tensor, outs: Sequence[Tensor]) -> None:
        """Write M mixtures to `outs`, (M, *) each; coefficients is (M, K)."""
        if self.sharding is None:
            for bases, out in zip(self.views(self.bases), outs, strict=True):
                kernels.mix_rows(bases.flatten(1), coefficients, out.flatten(1))
            return
        own = self.weights.new_empty(len(coefficients), self.bases.shape[1])
        kernels.mix_rows(self.bases, coefficients, own)
        whole = torch.empty_like(self.weights)
        for i, row in enumerate(own):
            self.sharding.gather(row, whole)
            for out, values in zip(outs, self.views(whole), strict=True):
                out[i] = values

    def refresh(self) -> None:
        """Write the one basis into the network, if it has changed."""
        if not self.is_aliased and self._written != self.bases._version:
            self._own(self.weights).copy_(self.bases[0])
            self._gather(self.weights)
            self._written = self.bases._version

    def _own(self, whole: Tensor) -> Tensor:
        """Return the part of (..., P) that this process mixes."""
        return whole if self.sharding is None else self.sharding.own(whole)

    def _gather(self, weights: Tensor) -> None:
        """Complete (P) weights of which this process has mixed its part."""
        if self.sharding is not None:
            self.sharding.gather(self._own(weights).clone(), weights)

    def prepare_grads(self, rows: int, direct: bool) -> None:
        """Allocate `rows` gradients; unless `direct`, the network writes to a scratch one."""
        had_scratch = self.scratch is not None
        size = len(self.weights) if direct else self.bases.shape[1]
        self._allocate(rows, size, self.weights.dtype if direct else self.bases.dtype).zero_()
        if had_scratch == direct:
            self.scratch = None if direct else torch.zeros_like(self.weights)
        self.point_grads(0)

    def prepare_stacked_grads(self, rows: int, dtype: torch.dtype) -> None:
        """Allocate `rows` gradients for `write_grads` or `write_folded`, then `clear_rest`."""
        self._allocate(rows, len(self.weights), dtype)
        self.scratch = None
        self._unwritten = set(range(len(self.shapes)))
        for parameter in self.parameters:
            parameter.grad = None

    def write_grads(self, place: int, grads: Tensor) -> None:
        """Take M plain gradients of parameter number `place`, (M, *)."""
        assert self.grads is not None
        self.part(self.grads, place).copy_(grads.flatten(1))
        self._unwritten.remove(place)

    def write_folded(self, place: int, grads: Tensor, weights: Tensor) -> Tensor:
        """Take what M plain gradients of a parameter, (M, *), make of its bases'.

        Args:
            place: Number of the parameter.
            grads: (M, *).
            weights: (M, K) of the gradients in those of the bases.

        Returns:
            (M, K) their inner products with the bases.
        """
        assert self.grads is not None
        bases, sums = self.part(self.bases, place), self.part(self.grads, place)
        self._unwritten.remove(place)
        return kernels.fold(bases, grads.flatten(1), weights, sums)

    def clear_rest(self) -> None:
        """Give the parameters that got no gradient one of 0."""
        for place in self._unwritten:
            assert self.grads is not None
            self.part(self.grads, place).zero_()
        self._unwritten.clear()

    def _allocate(self, rows: int, size: int, dtype: torch.dtype) -> Tensor:
        """Let gradients be (rows, size), in the storage of the last step if that fits.

        What lies between parameters is 0 and stays so.
        """
        kept = self._grads_storage
        if kept is None or kept.shape != (rows, size) or kept.dtype != dtype:
            kept = self._grads_storage = self.weights.new_zeros(rows, size, dtype=dtype)
        self.grads = kept
        return kept

    def point_grads(self, row: int) -> None:
        """Let back-propagation write to one row of the gradients (or to the scratch one)."""
        assert self.grads is not None
        target = self.grads[row] if self.scratch is None else self.scratch
        for parameter, grad in zip(self.parameters, self.views(target), strict=True):
            parameter.grad = grad

    def collect_grads(self) -> Tensor:
        """Take one backward pass out of scratch: its gradient (P), or the slice of the sum."""
        assert self.scratch is not None
        grad = self.scratch
        if self.sharding is not None:
            grad = self.sharding.sum_own(grad)
        grad = grad.to(self.bases.dtype, copy=True)
        self.scratch.zero_()
        return grad

    def round_grads(self) -> None:
        """Give gradients of one backward pass the network's dtype: half of the bytes to send."""
        if self.grads is not None and self.scratch is None:
            self.grads = self.grads.to(self.weights.dtype)

    def _attach(self) -> None:
        """Make the network's parameters views of `weights`."""
        self._point(self.weights)
        for parameter in self.parameters:
            parameter.grad = None

    def _point(self, weights: Tensor) -> None:
        """Make the network's parameters views of flat weights (P,)."""
        self._elsewhere = weights is not self.weights
        for parameter, values in zip(self.parameters, self.views(weights), strict=True):
            parameter.data = values


def check_same_shapes(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Refuse weights that are missing, unknown or of another shape."""
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or extra:
        raise ValueError(f"weights must match the model: missing {missing}, extra {extra}")
    for name, values in own.items():
        if values.shape != given[name].shape:
            raise ValueError(
                f"{name} must have the shape {tuple(values.shape)}, got {tuple(given[name].shape)}"
            )
