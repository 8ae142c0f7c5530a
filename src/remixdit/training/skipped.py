"""Steps that are skipped because their gradients are not finite.

A skipped step changes no weight, moment or average. Every process skips the same steps: whether
the norm of the gradients of all processes is finite is the same for all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from remixdit import distributed
from remixdit.training.plan import Inputs

__all__ = ["MAX_IN_A_ROW", "Skipped", "bad_positions", "refusal"]

MAX_IN_A_ROW = 10  # one bad batch must not end a run; a run that learns nothing must
NUM_NAMED = 8  # images named in an error


class Skipped:
    """Numbers of skipped steps, kept on the device.

    Args:
        device: Device of the run.
        total: Number of steps that were skipped before.
    """

    def __init__(self, device: torch.device, total: int = 0) -> None:
        self.counts = torch.tensor([total, 0], device=device)  # in all, and in a row until now

    def add(self, good: Tensor) -> None:
        """Count a step, skipped unless `good`, without waiting for the device."""
        bad = good.logical_not()
        self.counts += bad
        self.counts[1] *= bad

    def total(self) -> int:
        """Return the number of skipped steps; this waits for the device."""
        return int(self.counts[0])

    def in_a_row(self) -> int:
        """Return how many steps in a row were skipped until now; this waits for the device."""
        return int(self.counts[1])


def bad_positions(inputs: Inputs, losses: Sequence[Tensor], batch_size: int) -> list[int]:
    """Return the places in the batch of the images without a finite loss, of all processes.

    Args:
        inputs: Inputs of the step.
        losses: Losses of its images, those of each micro-batch.
        batch_size: Images of all processes.
    """
    bad = torch.cat(list(losses)).isfinite().logical_not()
    places = torch.zeros(batch_size, device=bad.device)
    places[inputs.positions.to(bad.device)] = bad.float()
    distributed.all_reduce([places])
    return [int(place) for place in places.nonzero()[:, 0]]


def refusal(step: int, in_a_row: int, experts: Sequence[int], images: Sequence[int]) -> ValueError:
    """Return the error of a run that skips step after step.

    Args:
        step: Number of steps done.
        in_a_row: Number of steps in a row that were skipped.
        experts: Experts, or strata, of the last one.
        images: Indices of its images without a finite loss, in the order of the data.
    """
    named = ", ".join(map(str, images[:NUM_NAMED])) + ", ..." * (len(images) > NUM_NAMED)
    return ValueError(
        f"gradients must be finite, got {in_a_row} skipped steps in a row up to step {step}: "
        f"expert{'s' * (len(experts) > 1)} {', '.join(map(str, experts))}, "
        + (f"images {named} of the data" if images else "no image has a loss that is not finite")
        + "; look at these images, or train again with a smaller --learning-rate"
    )
