"""The gradients that one optimizer step leaves for the bases and the coefficients.

Back-propagation through the network of expert n gives the plain gradient g. The gradient of basis k
is coefficients[n, k] * g, so with M <= K experts the plain ones are kept and nobody forms it: the
optimizer takes g and the coefficients. With more experts K gradients of the bases are fewer, and
plain ones are folded into them as they come. The gradient of coefficients[n, k] is <bases[k], g>.

Experts come in turn (`begin_step`, then `begin_expert` and `collect` for each), or several in one
pass (`begin_stacked_step`, then `collect_stacked` for each parameter; see `stacking`).

Shapes: K bases, N experts, M experts of a step, P numbers of a segment, L coefficient tables,
* = the shape of one parameter of the network.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from remixdit.first import kernels
from remixdit.first.mixing import Mixture
from remixdit.first.segments import Segment
from remixdit.first.sharding import total_of

__all__ = ["StepGradients"]


class StepGradients:
    """What back-propagation leaves in one step, for the bases of a mixture.

    Args:
        mixture: Its segments hold the gradients (R, P): R = M plain ones or K of the bases.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture, self.segments = mixture, mixture.segments
        self._folded = False  # gradients of bases are accumulated, not plain ones
        self._collected: list[tuple[int, Tensor]] = []  # (expert, (L, K)) of this step
        self._rows: list[Tensor] = []  # (L, K) coefficients of this step's experts
        # (M, L, K) of experts in one pass: coefficients, and the gradients of these.
        self._stacked_rows = self._stacked_dots = mixture.logits.new_empty(0)

    def begin_step(self, experts_per_step: int = 1, rounds: int = 1) -> None:
        """Make ready for the gradients of one optimizer step.

        M plain gradients are kept for M <= K experts. For more, K gradients of the bases are
        accumulated instead, and one plain gradient serves all experts in turn.

        Args:
            experts_per_step: M.
            rounds: Backward passes that each expert gets; their sum is kept in float32.
        """
        self._folded = self._folds(experts_per_step)
        self._collected, self._rows = [], []
        for segment in self.segments:
            rows, backwards = 1, rounds * experts_per_step
            if segment.is_mixed:
                rows = self.mixture.num_bases if self._folded else experts_per_step
                backwards = rounds
            # Sums of several backward passes are kept in float32.
            exact = backwards == 1 or segment.weights.dtype == segment.bases.dtype
            folds = segment.is_mixed and self._folded
            # Sharded, each pass leaves a slice.
            segment.prepare_grads(rows, exact and not folds and self.mixture.sharding is None)

    def begin_stacked_step(self, experts: Sequence[int]) -> None:
        """Make ready for the gradients of several experts that run in one pass.

        M plain gradients are kept for M <= K experts. For more, they become those of the bases
        parameter by parameter; unless this process has only a slice of the bases to hold them
        against, or coefficients are raw, which need not sum to 1: clipping needs the plain ones.
        """
        count = len(experts)
        self._folded = self._folds(count) and self.mixture.sharding is None
        for segment in self.segments:
            if not segment.is_mixed:
                segment.prepare_grads(1, direct=True)
                segment.refresh()
            elif self._folded:
                segment.prepare_stacked_grads(self.mixture.num_bases, segment.bases.dtype)
            else:
                segment.prepare_stacked_grads(count, segment.weights.dtype)
        # An index of many would wait for a GPU.
        every = self.mixture.coefficients().detach().unbind(1)
        self._stacked_rows = torch.stack([every[expert] for expert in experts])
        self._stacked_dots = torch.zeros_like(self._stacked_rows)
        self._rows = list(self._stacked_rows)
        self._collected = list(zip(experts, self._stacked_dots, strict=True))

    @torch.no_grad()
    def collect_stacked(self, segment: Segment, place: int, grads: Tensor) -> None:
        """Take in the gradients (M, *) of parameter number `place` of a segment."""
        table = segment.table or 0
        if not self._folded:
            segment.write_grads(place, grads)
            return
        products = segment.write_folded(place, grads, self._stacked_rows[:, table])
        self._stacked_dots[:, table] += products

    def begin_expert(self, expert: int) -> None:
        """Activate the next expert of the step and let its gradients be written."""
        self.mixture.activate(expert)
        row = len(self._rows)
        self._rows.append(self.mixture.coefficients(expert).detach())
        self._collected.append((expert, torch.zeros_like(self._rows[-1])))
        for segment in self.segments:
            segment.point_grads(row if segment.is_mixed and segment.scratch is None else 0)

    @torch.no_grad()
    def collect(self) -> None:
        """Take in the gradient of one backward pass; call it after each."""
        coefficients, (_, dots) = self._rows[-1], self._collected[-1]
        for segment in self.segments:
            if segment.scratch is None:
                continue  # back-propagation wrote to where it stays
            assert segment.grads is not None
            grad = segment.collect_grads()
            if not segment.is_mixed:
                segment.grads[0] += grad
            elif self._folded:
                dots[segment.table or 0] += segment.bases @ grad
                segment.grads.addr_(coefficients[segment.table or 0], grad)
            else:
                segment.grads[len(self._rows) - 1] += grad

    @torch.no_grad()
    def to_reduce(self) -> list[Tensor]:
        """Return what several processes have to sum: the gradients of this step, made small.

        Of M plain gradients and K of the bases it is whichever is fewer, but for raw coefficients
        the plain ones; with those of the bases go the gradients of the coefficients, as they need
        the plain ones.
        """
        for segment in self.segments:
            segment.round_grads()
        grads = [segment.grads for segment in self.segments if segment.grads is not None]
        return grads + [dots for _, dots in self._collected if self._folded]

    @torch.no_grad()
    def slice_grads(self) -> None:
        """Keep this process's slices of the sum of what several experts left in one pass."""
        sharding = self.mixture.sharding
        for segment in self.segments:
            if sharding is not None and segment.scratch is None and segment.grads is not None:
                segment.grads = sharding.sum_own(segment.grads)

    def basis_weights(self, segment: Segment) -> Tensor:
        """Return (R, K): the gradient of basis k is sum_r basis_weights[r, k] * grads[r]."""
        if not segment.is_mixed or self._folded:
            bases = segment.bases
            return torch.eye(len(bases), device=bases.device, dtype=bases.dtype)
        return self.expert_rows(segment)

    def expert_rows(self, segment: Segment) -> Tensor:
        """Return (M, K): the coefficients in a mixed segment of this step's experts."""
        return torch.stack([row[segment.table or 0] for row in self._rows])

    @torch.no_grad()
    def coefficient_grads(self) -> list[tuple[int, Tensor]]:
        """Return the (expert, (L, K) gradient of its coefficients) of this step's experts."""
        totals = [(expert, dots.clone()) for expert, dots in self._collected]
        for segment in self.segments:
            if not segment.is_mixed or self._folded:
                continue
            assert segment.grads is not None
            products = kernels.inner_products(segment.bases, segment.grads)  # (M, K)
            for (_, dots), product in zip(totals, products, strict=True):
                dots[segment.table or 0] += product
        summed = total_of(torch.stack([dots for _, dots in totals]), self.mixture.sharding)
        return [(expert, dots) for (expert, _), dots in zip(totals, summed, strict=True)]

    @property
    def drawn_experts(self) -> list[int]:
        """The experts of this step, in the order in which they were begun."""
        return [expert for expert, _ in self._collected]

    def _folds(self, count: int) -> bool:
        """Whether K gradients of the bases are fewer than those of so many experts.

        Raw coefficients need not sum to 1, so their plain gradients are kept for clipping.
        """
        return count > self.mixture.num_bases and self.mixture.kind != "raw"
