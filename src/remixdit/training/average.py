"""The running average of the weights (EMA), which sampling uses.

average = lerp(average, weights, 1 - decay)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from remixdit.distributed.parallel import local

__all__ = ["Average"]


class Average:
    """One average for each trained parameter of a network, sharded as that is.

    Attributes:
        values: Averages by the name of the parameter, (*) or its slice.
    """

    def __init__(self, network: nn.Module) -> None:
        self.parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self.values: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def update(self, weight: float, good: Tensor) -> None:
        """Average the current weights in, unless the step was skipped.

        Args:
            weight: Share of the current weights.
            good: Whether the step was taken, a scalar on the device.
        """
        averages = [local(values) for values in self.values.values()]
        present = [local(parameter.detach()) for parameter in self.parameters.values()]
        if good.device.type != "cpu":
            lerp_if(good, averages, present, weight)
        elif good:  # on a CPU there is nothing to wait for
            get_ema_multi_avg_fn(1 - weight)(averages, present, 0)  # type: ignore[no-untyped-call]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the network hold the averages inside of a `with` block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            own, average = local(parameter.detach()), local(self.values[name])
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)
            # torch does not count a write through the local part of a sharded parameter.
            torch.autograd.graph.increment_version(parameter)


def lerp_if(
    good: Tensor, averages: Sequence[Tensor], present: Sequence[Tensor], weight: float
) -> None:
    """Do what the stock function does, with the share 0 unless `good`, without waiting for it."""
    share = good * (1 - (1 - weight))  # as the stock function rounds it
    for average, values in zip(averages, present, strict=True):
        average.lerp_(values, share)
