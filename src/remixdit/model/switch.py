"""One plain network that takes the weights of one expert after the other.

A trajectory falls through the intervals, so it writes each expert at most once, whatever its number
of steps. The mixture's own forward would mix every layer at every step.

Shapes: K bases, N experts, L coefficient tables, * = one parameter.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from remixdit.distributed.parallel import local, whole
from remixdit.mixture.experts import Experts
from remixdit.mixture.low_rank import LowRankLinear, merged
from remixdit.mixture.product import mix

__all__ = ["Switch"]


class Switch:
    """A plain network that takes the weights of any expert.

    Args:
        experts: Experts whose current weights are written. Shared parameters of the same dtype are
            the mixture's own, without a copy.
        network: Plain network of the shape of the experts, on any device, also meta; its weights
            are replaced.
        dtype: Dtype of the network, except its `float32_modules`; None for the mixture's.
        compile: Whether to compile the network, once for all experts.
    """

    def __init__(
        self,
        experts: Experts,
        network: nn.Module,
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        self.experts, self.network = experts, network
        self.network.eval()
        own = dict(network.named_parameters())
        self.pairs = [
            self._pair(name, source, dtype)
            for name, source in experts.network.named_parameters()
            if name in own and not name.startswith("experts.")
        ]
        self.network.to(experts.logits.device)  # buffers; the parameters are there
        if compile:
            self.network.compile()
        self._kinds = [kind(parameter) for parameter in experts.network.parameters()]
        self._holds: tuple[Any, ...] | None = None  # the expert, and the versions of its sources
        self._ready: list[Tensor | None] = []  # (N, *) of each mixed parameter
        self._ready_for: tuple[Any, ...] | None = None

    def _pair(
        self, name: str, source: nn.Parameter, dtype: torch.dtype | None
    ) -> tuple[nn.Parameter, tuple[nn.Parameter, ...], int | None]:
        """Make a plain parameter; return it with its sources, and its table if it is mixed."""
        owner, _, leaf = name.rpartition(".")
        module = self.network.get_submodule(owner)
        kept = getattr(self.network, "float32_modules", ())
        exact = dtype is None or any(part in kept for part in name.split("."))
        shape = module.get_parameter(leaf).shape
        values = torch.empty(shape, device=source.device, dtype=source.dtype if exact else dtype)
        module.register_parameter(leaf, nn.Parameter(values, requires_grad=False))
        layer = self.experts.network.get_submodule(owner)
        if leaf == "weight" and isinstance(layer, LowRankLinear):
            return module.get_parameter(leaf), (source, layer.down, layer.up), layer.table
        return module.get_parameter(leaf), (source,), self.experts.table_of(name)

    def write(self, expert: int) -> nn.Module:
        """Return the network with the weights of an expert in [0, N)."""
        if not 0 <= expert < self.experts.num_experts:
            raise ValueError(f"expert must be in [0, {self.experts.num_experts}), got {expert}")
        versions = self._versions()
        if self._holds == (expert, versions):
            return self.network
        nothing: list[Tensor | None] = [None] * len(self.pairs)
        ready = self._ready if self._ready_for == versions else nothing
        self._write(expert, ready, shared=self._holds is None or self._holds[1] != versions)
        self._holds = expert, versions
        return self.network

    def is_current(self) -> bool:
        """Whether the mixture still has the parameters, dtypes and device that it had."""
        return [kind(p) for p in self.experts.network.parameters()] == self._kinds

    @torch.no_grad()
    def _write(self, expert: int, ready: list[Tensor | None], shared: bool) -> None:
        rows = self._coefficients()[:, expert]  # (L, K)
        for (parameter, sources, table), kept in zip(self.pairs, ready, strict=True):
            if kept is not None:
                parameter.data = kept[expert]
            elif table is not None:
                parameter.data = self._mixed(sources, rows[table], parameter.dtype)
            elif shared:
                parameter.data = whole(sources[0].detach()).to(parameter.dtype)  # itself, if it can

    def _coefficients(self) -> Tensor:
        """Return (L, N, K), of logits that may be sharded."""
        return self.experts.coefficients(logits=whole(self.experts.logits.detach()))

    def _mixed(self, sources: tuple[Tensor, ...], row: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a parameter (*) of one expert."""
        if len(sources) > 1:
            weight, down, up = (whole(values.detach()) for values in sources)
            return merged(weight, down, up, row).to(dtype)
        (bases,) = sources
        if self.experts.kind == "one_hot":  # no arithmetic, and on one device no copy
            return whole(bases.detach()[int(row.argmax())]).to(dtype)
        return mixed(bases.detach(), row).to(dtype)

    @torch.no_grad()
    def precompute(self) -> None:
        """Mix all N experts once and keep them until a weight changes.

        This takes the memory of N networks.
        """
        versions = self._versions()
        if self._ready_for == versions:
            return
        self._ready = [None] * len(self.pairs)
        rows = self._coefficients()
        for i, (parameter, sources, table) in enumerate(self.pairs):
            if table is not None and (len(sources) > 1 or self.experts.kind != "one_hot"):
                parts = [self._mixed(sources, row, parameter.dtype) for row in rows[table]]
                self._ready[i] = torch.stack(parts)
        self._ready_for, self._holds = versions, None

    def _versions(self) -> tuple[tuple[int, int, int], ...]:
        """Return values that change whenever a weight does: torch counts every in-place write."""
        parameters = self.experts.network.parameters()
        return tuple((id(p), p._version, data_pointer(p)) for p in parameters)


def kind(parameter: Tensor) -> tuple[int, torch.dtype, torch.device]:
    """Return the properties of a parameter that stay when only its values change."""
    return id(parameter), parameter.dtype, parameter.device


def data_pointer(values: Tensor) -> int:
    """Return the address of a tensor's values."""
    return local(values).data_ptr()


def mixed(bases: Tensor, row: Tensor) -> Tensor:
    """Return a whole parameter (*) of (K, *) bases that may be sharded, and (K,) coefficients."""
    if not isinstance(bases, DTensor):
        return mix(bases, row[None], bases.dtype)[0]
    placement = bases.placements[-1]
    cut = placement.dim if isinstance(placement, Shard) else 0
    if cut == 0:
        return mix(whole(bases), row[None], bases.dtype)[0]
    own = mix(bases.to_local(), row[None], bases.dtype)[0]
    placements = [*bases.placements[:-1], Shard(cut - 1)]
    return DTensor.from_local(own, bases.device_mesh, placements).full_tensor()
