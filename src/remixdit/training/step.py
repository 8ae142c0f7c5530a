"""The gradients of one training step: forward, loss and backward pass.

Shapes: b images of this process, M experts of a step, I intervals.
"""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from remixdit import distributed
from remixdit.model.model import RemixDiT
from remixdit.training.plan import Inputs

__all__ = ["Window", "gradients"]


class Window:
    """Sums over the steps since the last line of metrics, kept on the device.

    A step whose gradients are not finite is left out of them.
    """

    def __init__(self, num_intervals: int, device: torch.device) -> None:
        self.losses = torch.zeros(3, num_intervals, device=device)  # total, mse, count
        self.norms = torch.zeros(3, device=device)  # gradients: all, logits by task and by prior
        self.before = self.losses.clone()  # the losses at the end of the last step
        self.steps = 0
        self.good_steps = torch.zeros((), device=device)
        self.image_losses: list[Tensor] = []  # of the present step, (b,) in all
        self.started = time.perf_counter()

    def add_losses(self, strata: Tensor, total: Tensor, mse: Tensor) -> None:
        """Add the losses (b,) of images of the intervals `strata` (b,)."""
        rows = torch.stack([total, mse, torch.ones_like(mse)]).detach()
        self.losses.index_add_(1, strata, rows.float())
        self.image_losses.append(total.detach())

    def end_step(self, norms: Tensor, good: Tensor) -> list[Tensor]:
        """End a step; return the losses of its images, those of each micro-batch.

        Args:
            norms: (3,) norms of the gradients: all, logits by task and by prior.
            good: Whether the step is taken, a scalar.
        """
        self.losses = torch.where(good, self.losses, self.before)
        self.before = self.losses.clone()
        self.norms += torch.where(good, norms, 0.0)
        self.good_steps += good
        self.steps += 1
        losses, self.image_losses = self.image_losses, []
        return losses

    def loss_so_far(self, masses: Tensor) -> float:
        """Return the mean loss of this process's images, NaN without any; the window goes on."""
        total, _, count = self.losses.cpu()
        seen = count > 0
        return mean_of((total / count)[seen], masses[seen])

    def means(self, masses: Tensor, batch_size: int) -> dict[str, Any]:
        """Return a line of metrics; only this waits for the device."""
        distributed.all_reduce([self.losses])
        total, mse, count = self.losses.cpu()
        by_interval, mse_by_interval = total / count, mse / count  # NaN where nothing was drawn
        seen = count > 0
        norm, task, prior = (self.norms / self.good_steps).tolist()
        return {
            "loss": mean_of(by_interval[seen], masses[seen]),
            "mse": mean_of(mse_by_interval[seen], masses[seen]),
            "loss_by_interval": [
                float(value) if known else None
                for value, known in zip(by_interval, seen, strict=True)
            ],
            "grad_norm": norm,
            "logits_task_grad": task,
            "logits_prior_grad": prior,
            "images_per_second": self.steps * batch_size / (time.perf_counter() - self.started),
        }


def mean_of(losses: Tensor, masses: Tensor) -> float:
    """Return the mean of the losses of intervals by their masses, NaN without any."""
    return float((losses * (masses / masses.sum())).sum()) if len(losses) else math.nan


def gradients(
    model: RemixDiT,
    network: nn.Module,
    inputs: Inputs,
    window: Window,
    *,
    micro_batch_size: int = 0,
    precision: torch.dtype = torch.float32,
) -> None:
    """Add the gradients of one process's share of a step to those of the parameters.

    Args:
        model: Model whose noise process and experts are used.
        network: Network of the model, wrapped by DDP or FSDP2 or not.
        inputs: Inputs of b images sorted by group, on the CPU.
        window: Window that accumulates the losses.
        micro_batch_size: Number of images in one forward pass; 0 for all.
        precision: Precision of the arithmetic; parameters are float32.
    """
    network.train()
    kind = model.device.type
    for part, is_last in micro_batches(inputs, micro_batch_size):
        own = part.to(model.device)
        timesteps = model.process.network_timesteps(own.timesteps)
        noisy = model.process.add_noise(own.latents, own.noise, own.timesteps)
        with gathering(network, is_last), routing(model, own.strata):
            with torch.autocast(kind, precision, enabled=precision != torch.float32):
                output = network(noisy, timesteps, own.class_labels)
            loss = model.process.loss(output, own.latents, own.noise, own.timesteps)
            # Processes average their gradients, and the weights of all images sum to 1.
            total = (loss.total * own.weights).sum() * distributed.num_ranks()
            torch.autograd.backward(total)
        window.add_losses(own.strata.to(loss.total.device, non_blocking=True), loss.total, loss.mse)


def micro_batches(inputs: Inputs, size: int) -> Iterator[tuple[Inputs, bool]]:
    """Yield the images in parts of at most `size`, each with whether it is the last.

    They stay sorted, so a part holds few experts and mixes no others.
    """
    count = len(inputs.latents)
    size = size or count
    for start in range(0, count, size):
        yield inputs.rows(start, min(start + size, count)), start + size >= count


def routing(model: RemixDiT, strata: Tensor) -> AbstractContextManager[None]:
    """Route the images to their experts; a plain network needs no route."""
    return model.experts.route(strata) if model.num_experts > 1 else nullcontext()


def gathering(network: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Let DDP send gradients with the last micro-batch only, which needs no more memory.

    FSDP2 sends them with each: whole gradients would cost the memory that it saves.
    """
    if is_last or not isinstance(network, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return network.no_sync()
