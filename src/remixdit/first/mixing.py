"""Experts as linear mixtures of basis weights (arXiv 2412.05628).

A plain network holds one set of parameters. A `Mixture` holds K of each, stacked, and a table
of logits that mixes them into N experts:

    weights[n] = sum_k coefficients[n, k] * bases[k],    coefficients = softmax(logits)

The network itself is never changed: `activate(n)` writes the weights of expert n into its own
parameters, in place. What back-propagation leaves there is for `step_gradients`.

Shapes: K bases, N experts, P numbers of a segment, L coefficient tables (1, or one a block and one
for the rest), * = the shape of one parameter of the network.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from remixdit.first.segments import Segment, check_same_shapes
from remixdit.first.sharding import Shard
from remixdit.mixture.coefficients import KINDS, check_counts, initial_table, own_basis_loss
from remixdit.mixture.names import MIXED, block_of, grouped, keeps_float32, mixed_names, tied_names

__all__ = ["Mixture"]


class Mixture:
    """K bases and N experts of any network.

    Frozen parameters and buffers are left alone: one copy serves all experts. Tied parameters
    count once. A parameter that gets no gradient in a step counts as having a zero gradient.

    Args:
        network: Its parameters become the bases (K copies) and are from now on views of this
            object's buffers; it stays usable as it is.
        num_bases: K, in 1..N.
        num_experts: N, at least 1.
        mixed: A name of `selection.MIXED`, or patterns of parameter names ("blocks.*.mlp.*"), which
            one string may hold with commas between.
        coefficients: "softmax" (learned, positive, summing to 1), "raw" (learned, free) or
            "one_hot" (frozen: expert n is basis floor(n K / N)).
        per_block: One table for each block, and one for the rest, instead of one for all.
        symmetry: How strongly expert n starts with its own basis floor(n K / N); at 0, equal
            bases would stay equal for ever.
    """

    def __init__(
        self,
        network: nn.Module,
        num_bases: int,
        num_experts: int,
        *,
        mixed: str | Sequence[str] = "attention+mlp",
        coefficients: str = "softmax",
        per_block: bool = False,
        symmetry: float = 8.0,
    ) -> None:
        check_counts(num_bases, num_experts)
        if coefficients not in KINDS:
            raise ValueError(
                f"coefficients must be one of {', '.join(KINDS)}, got {coefficients!r}"
            )
        self.network = network
        self.num_bases, self.num_experts = num_bases, num_experts
        self.kind, self.per_block = coefficients, per_block
        self.patterns = (
            tuple(MIXED.get(mixed) or mixed.split(",")) if isinstance(mixed, str) else tuple(mixed)
        )
        self.tied = tied_names(network)
        names = mixed_names(network, self.patterns, self.tied)
        num_tables = 1 + max((block_of(name) for name in names), default=-1) + 1 if per_block else 1
        self.segments = list(self._segments(names, num_tables))
        masters = self.segments[0].bases
        table = initial_table(num_bases, num_experts, coefficients, symmetry)
        if per_block:
            table = table.expand(num_tables, -1, -1).clone()
        self.logits = nn.Parameter(table.to(masters), requires_grad=coefficients != "one_hot")
        self.sharding: Shard | None = None
        self._changes = 0
        self._active: tuple[int, ...] | None = None  # what the network holds now
        self._precomputed: dict[int, Tensor] = {}  # segment: (N, P)
        self._precomputed_key: tuple[int, ...] | None = None

    def _segments(self, names: set[str], num_tables: int) -> Iterator[Segment]:
        """Lay the trainable parameters out, together what is mixed and stored alike."""
        groups = grouped(self.network, names, num_tables if self.per_block else 1)
        if all(table is None for table, _, _ in groups):
            raise ValueError(f"mixed must match a trainable parameter, got {list(self.patterns)}")
        fixed = self.num_bases == 1 and self.kind != "raw"
        for (table, _, _), parameters in groups.items():
            shared = table is None
            yield Segment(parameters, table, 1 if shared else self.num_bases, shared or fixed)

    def cast_network(self, dtype: torch.dtype) -> None:
        """Let the network hold its weights in `dtype`, such as bfloat16.

        What it lists in `float32_modules` stays as it is, and so do the bases: the cast happens
        when an expert is written.
        """
        for segment in self.segments:
            if not keeps_float32(self.network, segment.names[0]):
                segment.cast(dtype)
        self.weights_changed()

    def shard(self, sharding: Shard) -> None:
        """Share the bases out over the processes; from now on all have to mix together."""
        self.sharding = sharding
        for segment in self.segments:
            segment.shard(sharding)
        self.weights_changed()

    # --- the experts

    @property
    def num_tables(self) -> int:
        """L."""
        return self.logits.shape[0] if self.per_block else 1

    @property
    def learns_coefficients(self) -> bool:
        """Whether the logits have a gradient: not if frozen, nor if the one coefficient is 1."""
        return self.kind == "raw" or (self.kind == "softmax" and self.num_bases > 1)

    @property
    def device(self) -> torch.device:
        """Where bases and logits are."""
        return self.logits.device

    def coefficients(self, expert: int | None = None) -> Tensor:
        """Return the coefficients, differentiable with respect to the logits.

        Args:
            expert: In [0, N), or None for all.

        Returns:
            (L, K) of one expert, or (L, N, K) of all; L = 1 for a single table.
        """
        tables = self.logits if self.per_block else self.logits[None]  # (L, N, K)
        if expert is not None:
            tables = tables[:, expert]
        return tables.softmax(-1) if self.kind == "softmax" else tables

    @torch.no_grad()
    def activate(self, expert: int) -> None:
        """Write the weights of one expert into the network, in place.

        Nothing happens when they are there already, so a trajectory of any number of steps
        mixes at most N times.
        """
        if not 0 <= expert < self.num_experts:
            raise ValueError(f"expert must be in [0, {self.num_experts}), got {expert}")
        key = self._key(expert)
        if key == self._active:
            return
        coefficients = self.coefficients(expert).detach()
        ready = self._precomputed if self._precomputed_key == key[1:] else {}
        for i, segment in enumerate(self.segments):
            if i in ready:
                segment.show(ready[i][expert])
            else:
                segment.mix(coefficients[segment.table or 0])
        self._active = key

    @torch.no_grad()
    def precompute(self) -> None:
        """Mix all N experts once and keep them, until bases or logits change.

        Costs the memory of N networks; to activate an expert is then a copy, or on a CPU nothing.
        """
        key = self._key(0)[1:]
        if self._precomputed_key == key:
            return
        mixed = {i: segment for i, segment in enumerate(self.segments) if not segment.constant}
        ready = {i: s.weights.new_empty(self.num_experts, len(s.weights)) for i, s in mixed.items()}
        for expert in range(self.num_experts):
            self.activate(expert)
            for i, segment in mixed.items():
                ready[i][expert] = segment.weights
        self._precomputed, self._precomputed_key = ready, key

    def _key(self, expert: int) -> tuple[int, ...]:
        """Return what the weights of an expert depend on: every write in place counts up."""
        bases = (segment.bases for segment in self.segments)
        return expert, self._changes, self.logits._version, *(b._version for b in bases)

    def weights_changed(self) -> None:
        """Say that bases or logits were written in a way that torch does not count."""
        self._changes += 1

    def prior_loss(self) -> Tensor:
        """Return (N,) cross-entropies of the coefficients to each expert's own basis.

        Expert n's own basis is floor(n K / N); with a table for each block, the mean over them.
        """
        return own_basis_loss(self.logits if self.per_block else self.logits[None])

    # --- the weights as a whole

    def bases(self) -> dict[str, Tensor]:
        """Return the bases of every mixed parameter: (K, *), views unless sharded."""
        mixed = (segment.named(segment.bases) for segment in self.segments if segment.is_mixed)
        return {name: values for named in mixed for name, values in named.items()}

    @torch.no_grad()
    def expert_state(self, expert: int) -> dict[str, Tensor]:
        """Return the state dict of the plain network of one expert, mixed in float32."""
        coefficients = self.coefficients(expert)
        state = {name: values.clone() for name, values in self.network.state_dict().items()}
        for segment in self.segments:
            flat = segment.bases[0]
            if not segment.constant:
                flat = segment.bases.t() @ coefficients[segment.table or 0]
            state.update(zip(segment.names, segment.views(flat), strict=True))
        return state | {name: state[first] for name, first in self.tied.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return all weights: `bases.<name>` (K, *), `shared.<name>` (*), `logits`.

        Shared are the parameters that are not mixed, the frozen ones and the saved buffers.
        """
        bases = self.bases()
        state = {f"bases.{name}": values for name, values in bases.items()}
        for name, values in self.network.state_dict().items():
            if name not in bases and name not in self.tied:
                state[f"shared.{name}"] = values
        for segment in self.segments:
            if not segment.is_mixed:  # float32, where the network may hold bfloat16
                named = segment.named(segment.bases[0])
                state.update({f"shared.{name}": values for name, values in named.items()})
        return {**state, "logits": self.logits.detach()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy weights as given by `state_dict` in; refuses missing, extra or misshaped ones."""
        own, state = self.state_dict(), dict(state)
        check_same_shapes(own, state)
        for segment in self.segments:
            kind, bases = "bases" if segment.is_mixed else "shared", segment.bases
            named = (state.pop(f"{kind}.{name}") for name in segment.names)
            segment.load(bases if segment.is_mixed else bases[0], named)
        for name, values in state.items():
            own[name].copy_(values)
        self.weights_changed()
        self.activate(0)

    @torch.no_grad()
    def prefer_own(self, symmetry: float) -> None:
        """Let the coefficients start again, from another preference for the own basis."""
        table = initial_table(self.num_bases, self.num_experts, self.kind, symmetry)
        self.logits.copy_(table)  # the same for every block
        self.weights_changed()

    def perturb(self, scale: float, generator: torch.Generator) -> None:
        """Add normal noise to the bases, `scale` times the root mean square of each parameter."""
        for values in self.bases().values():
            size = scale * values.square().mean().sqrt()
            noise = torch.randn(values.shape, generator=generator, dtype=values.dtype)
            values.add_(noise.to(values.device) * size)
        self.weights_changed()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move bases and logits by `fn`, such as a change of device."""
        for segment in self.segments:
            segment.apply(fn)
        self.logits.data = fn(self.logits.data)
        self.logits.grad = None
        self.weights_changed()

    @contextmanager
    def swapped(self, bases: Iterable[Tensor], logits: Tensor) -> Iterator[None]:
        """Use other bases, (K, P) for each segment, and logits, such as their averages."""
        others = list(bases)
        self._swap(others, logits)
        try:
            yield
        finally:
            self._swap(others, logits)

    @torch.no_grad()
    def _swap(self, others: list[Tensor], logits: Tensor) -> None:
        others[:] = [s.swap(other) for s, other in zip(self.segments, others, strict=True)]
        kept = self.logits.detach().clone()
        self.logits.copy_(logits)
        logits.copy_(kept)
        self.weights_changed()
