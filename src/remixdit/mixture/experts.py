"""The N experts of a remixed network: the table of logits, and which images belong to whom.

    weights[n] = sum_k coefficients[n, k] * bases[k],    coefficients = softmax(logits)

    with experts.route(expert_of_image):
        outputs = network(inputs)
    plain = experts.plain(n)

Shapes: K bases, N experts, L coefficient tables (1, or one a block and one for the rest), M experts
that a batch of B images holds.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from remixdit.mixture.coefficients import initial_table, own_basis_loss
from remixdit.mixture.low_rank import LowRankLinear, pair_of
from remixdit.mixture.names import tied_names
from remixdit.mixture.routing import Batch, sorted_by_expert

__all__ = ["Experts"]


class Experts(nn.Module):
    """The experts of one network, which `remix` makes and registers as its child `experts`.

    Args:
        network: Network whose mixed layers ask this object for coefficients.
        num_bases: Number of bases, K.
        num_experts: Number of experts, N.
        kind: Kind of coefficients: "softmax", "raw" or "one_hot".
        num_tables: Number of tables, L; 0 for one table without a dimension of its own.
        symmetry: Preference for the own basis at the start; see `remix`.
    """

    network: nn.Module
    _route: Batch | None
    _batch: Batch | None

    def __init__(
        self,
        network: nn.Module,
        num_bases: int,
        num_experts: int,
        kind: str = "softmax",
        num_tables: int = 0,
        symmetry: float = 2.0,
    ) -> None:
        super().__init__()
        self.num_bases, self.num_experts, self.kind = num_bases, num_experts, kind
        self.per_block = num_tables > 0
        table = initial_table(num_bases, num_experts, kind, symmetry)
        if self.per_block:
            table = table.expand(num_tables, -1, -1).clone()
        first = next(network.parameters())
        table = table.to(first.device, torch.promote_types(first.dtype, torch.float32))
        # The one coefficient of one basis is 1 whatever its logit, which then gets no gradient.
        learns = kind == "raw" or (kind == "softmax" and num_bases > 1)
        self.logits = nn.Parameter(table, requires_grad=learns)
        self.mixed: dict[str, tuple[str, ...]] = {}  # layer: names of its mixed parameters
        self.__dict__["network"] = network  # not a child, as this is its child
        self._forget()
        network.register_forward_pre_hook(self._begin)

    # --- the current batch

    @property
    def is_mixing(self) -> bool:
        """Whether experts differ: one basis alone is the plain network."""
        return self.num_bases > 1 or self.kind == "raw"

    @contextmanager
    def route(self, expert_of_image: Tensor | Sequence[int]) -> Iterator[None]:
        """Name the expert of each image of a batch, for all forward passes inside.

        Images sorted by expert run without a copy; others are gathered and scattered back by every
        mixed layer. The first dimension of a mixed layer's input must hold the images in order; it
        may have several rows for each image (frames, heads).

        Gradients may be computed after the block. With activation checkpointing they must be
        computed before the next block, as recomputed layers use the last route.

        Args:
            expert_of_image: (B,) integers in [0, N), on the CPU, in any order.
        """
        given = torch.as_tensor(expert_of_image)
        route = sorted_by_expert(given, self.num_experts, self.logits.device)
        with self._lock:
            before, self._route = self._route, route
            try:
                yield
            finally:
                self._route = before

    def forward(self, values: Any) -> Any:
        """Return the input: an nn.Sequential runs all of its children, and this is one."""
        return values

    def current(self) -> Batch:
        """Return the batch that the network is running, for its layers."""
        if self._batch is None:
            raise RuntimeError(NO_ROUTE)
        return self._batch

    def _begin(self, network: nn.Module, inputs: Any) -> None:
        """Compute the coefficients of a batch, once for all layers, before the network runs.

        Here rather than in `route`, as FSDP2 has gathered the logits by now.
        """
        if not self.is_mixing:
            return
        if self._route is None:
            raise RuntimeError(NO_ROUTE)
        coefficients = self.coefficients()[:, self._route.experts]
        self._batch = self._route._replace(coefficients=coefficients)

    def _forget(self) -> None:
        self._route = self._batch = None
        self._lock = threading.RLock()  # threads that share the network run one at a time

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy and pickle, without the current batch."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_route", "_batch", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state that `__getstate__` gave."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()

    # --- the table

    def coefficients(self, expert: int | None = None, logits: Tensor | None = None) -> Tensor:
        """Return the coefficients, differentiable with respect to the logits.

        Args:
            expert: Index in [0, N), or None for all experts.
            logits: Logits of the same shape, in place of the experts' own.

        Returns:
            (L, K) of one expert, or (L, N, K) of all.
        """
        values = self.logits if logits is None else logits
        tables = values if self.per_block else values[None]
        if expert is not None:
            tables = tables[:, expert]
        return tables.softmax(-1) if self.kind == "softmax" else tables

    def prior_loss(self, logits: Tensor | None = None) -> Tensor:
        """Return (N,) cross-entropies of the coefficients to each expert's own basis.

        Expert n's own basis is floor(n K / N); with several tables, the mean over them.

        Args:
            logits: Logits of the same shape, in place of the experts' own.
        """
        values = self.logits if logits is None else logits
        return own_basis_loss(values if self.per_block else values[None])

    # --- the network

    def bases(self) -> dict[str, nn.Parameter]:
        """Return the mixed parameters (K, *) by their name in the network, tied ones once."""
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for layer, names in self.mixed.items():
            for name in names:
                full = f"{layer}.{name}"
                parameter = self.network.get_parameter(full)
                found.setdefault(id(parameter), (full, parameter))
        return dict(found.values())

    def table_of(self, name: str) -> int | None:
        """Return the index in [0, L) of a parameter's coefficient table, None if it is shared."""
        for layer, names in self.mixed.items():
            if name.startswith(f"{layer}.") and name.removeprefix(f"{layer}.") in names:
                return int(self.network.get_submodule(layer).table)  # type: ignore[arg-type]
        return None

    def disk_names(self) -> dict[str, str]:
        """Return the name on disk of each entry of the network's state dict, tied ones once.

        `bases.<parameter>` (K, *), `shared.<parameter>` (*) and `logits`, whatever the layers
        that hold them are called here.
        """
        tied, mixed = tied_names(self.network), self.mixed_names()
        names = {}
        for name in self.network.state_dict(keep_vars=True):
            if name not in tied:
                names[name] = f"bases.{name}" if name in mixed else f"shared.{name}"
        return {**names, "experts.logits": "logits"}

    def mixed_names(self) -> set[str]:
        """Return the names of the mixed parameters, all names of tied ones."""
        return {f"{layer}.{name}" for layer, names in self.mixed.items() for name in names}

    def plain(self, expert: int) -> nn.Module:
        """Return an expert as a plain network of the original classes, without a mixture.

        Args:
            expert: Index in [0, N).
        """
        return self.combined(self._rows(expert))

    @torch.no_grad()
    def lora(self, expert: int) -> dict[str, Tensor]:
        """Return what an expert of low-rank bases adds to the frozen network, as a LoRA.

        `<layer>.lora_A.weight` (K r, I) and `<layer>.lora_B.weight` (O, K r), whose product is
        added to the layer's weight, as diffusers' `load_lora_adapter(weights, prefix=None)` does.

        Args:
            expert: Index in [0, N).
        """
        rows, state = self._rows(expert), {}
        for name in self.mixed:
            layer = self.network.get_submodule(name)
            if not isinstance(layer, LowRankLinear):
                raise ValueError(f"rank must be at least 1 for a LoRA, got whole bases of {name}")
            pair = pair_of(layer.down, layer.up, rows[layer.table])
            for part, values in zip("AB", pair, strict=True):
                state[f"{name}.lora_{part}.weight"] = values.clone()
        return state

    def _rows(self, expert: int) -> Tensor:
        """Return the coefficients (L, K) of an expert in [0, N)."""
        if not 0 <= expert < self.num_experts:
            raise ValueError(f"expert must be in [0, {self.num_experts}), got {expert}")
        return self.coefficients(expert)

    @torch.no_grad()
    def combined(self, rows: Tensor) -> nn.Module:
        """Return the plain network of any coefficients, which need not be an expert's.

        Args:
            rows: (L, K) coefficients.
        """
        tied: dict[int, nn.Parameter] = {}
        nobody = nn.Identity()
        memo: dict[int, Any] = {id(self): nobody}
        for name in self.mixed:
            layer: Any = self.network.get_submodule(name)
            memo[id(layer)] = layer.plain(rows, tied)
        network = copy.deepcopy(self.network, {**memo, **tied})
        del network.experts
        hooks = network._forward_pre_hooks
        for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is nobody]:
            del hooks[key]
        return network


NO_ROUTE = (
    "a remixed network must know whose images it is given: call it inside "
    "`with experts.route(expert_of_image):`"
)
