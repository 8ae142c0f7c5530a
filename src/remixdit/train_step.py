"""One training step: the plan, drawn from (seed, step), and the gradients.

The plan is made for the batch of all processes, and each takes its share, so losses do not depend
on how many there are. Image i of the batch belongs to group i mod M, so that every process holds
some images of every expert.

Shapes: B = batch_size over all processes, M experts of a step, C H W latents, N experts.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from remixdit import distributed
from remixdit.data import Batch
from remixdit.intervals import Intervals
from remixdit.model import RemixDiT
from remixdit.optim import StepStats
from remixdit.seeds import generator_for
from remixdit.train_config import TrainConfig

__all__ = ["StepPlan", "Window", "plan_step", "train_step"]


class StepPlan(NamedTuple):
    """What a step does with each image, for the batch of all processes."""

    strata: tuple[int, ...]
    """(M,) intervals of this step."""
    groups: Tensor
    """(B,) int64 in [0, M): image i belongs to interval strata[i mod M]."""
    timesteps: Tensor
    """(B,) int64 in [0, T), or float32 in [0, 1]."""
    weights: Tensor
    """(B,) weight of each image in the loss; the sum is about 1."""


def plan_step(intervals: Intervals, count: int, batch_size: int, seed: int, step: int) -> StepPlan:
    """Draw the intervals and timesteps of a step.

    Args:
        intervals: Their experts are drawn, or their strata for a plain network.
        count: M, distinct ones.
        batch_size: B, at least M.
        seed: The run's.
        step: In [0, steps).
    """
    draw = intervals.draw_experts(count, seed, step)
    groups = torch.arange(batch_size) % count
    sizes = groups.bincount(minlength=count)
    generator = generator_for(seed, "timesteps", step)
    drawn = [
        intervals.draw_timesteps(stratum, int(size), generator)
        for stratum, size in zip(draw.experts, sizes, strict=True)
    ]
    timesteps = torch.empty(batch_size, dtype=drawn[0].dtype)
    for group, values in enumerate(drawn):
        timesteps[groups == group] = values
    weights = (torch.tensor(draw.weights, dtype=torch.float64) / sizes)[groups].float()
    return StepPlan(draw.experts, groups, timesteps, weights)


class Window:
    """Sums over the steps since the last line of metrics, kept on the device."""

    def __init__(self, num_intervals: int, device: torch.device) -> None:
        self.losses = torch.zeros(3, num_intervals, device=device)  # total, mse, count
        self.stats = torch.zeros(3, device=device)
        self.steps = 0
        self.started = time.perf_counter()

    def add_losses(self, strata: Tensor, total: Tensor, mse: Tensor) -> None:
        """Add the losses (B,) of images of the intervals `strata` (B,)."""
        rows = torch.stack([total, mse, torch.ones_like(mse)]).detach()
        self.losses.index_add_(1, strata, rows.float())

    def add_stats(self, stats: StepStats) -> None:
        """Add what the optimizer saw."""
        self.stats += torch.stack(list(stats))
        self.steps += 1

    def means(self, masses: Tensor, batch_size: int) -> dict[str, Any]:
        """Return the line of metrics; the one place that waits for the device."""
        distributed.all_reduce([self.losses])
        total, mse, count = self.losses.cpu()
        by_interval, mse_by_interval = total / count, mse / count  # NaN where nothing was drawn
        seen = count > 0
        share = masses[seen] / masses[seen].sum()
        norm, task, prior = (self.stats / max(1, self.steps)).tolist()
        return {
            "loss": float((by_interval[seen] * share).sum()),
            "mse": float((mse_by_interval[seen] * share).sum()),
            "loss_by_interval": [
                float(value) if known else None
                for value, known in zip(by_interval, seen, strict=True)
            ],
            "grad_norm": norm,
            "logits_task_grad": task,
            "logits_prior_grad": prior,
            "images_per_second": self.steps * batch_size / (time.perf_counter() - self.started),
        }


def train_step(
    model: RemixDiT,
    batch: Batch,
    plan: StepPlan,
    config: TrainConfig,
    step: int,
    window: Window,
) -> None:
    """Run and back-propagate one process's share of a step, expert by expert."""
    mixture, device = model.mixture, model.device
    noise = step_noise(batch.latents, batch.positions, config, step).to(device, non_blocking=True)
    latents = batch.latents.to(device, non_blocking=True)
    labels = dropped_labels(batch, model.config.network.num_classes, config, step).to(device)
    here = StepPlan(plan.strata, *(values[batch.positions].to(device) for values in plan[1:]))
    groups = list(expert_groups(model, plan.strata))
    rows_of = [torch.isin(here.groups, torch.tensor(g, device=device)) for _, g in groups]
    micro = config.micro_batch_size or len(latents)
    rounds = -(-len(latents) // min(micro, len(latents)))
    model.network.train()
    mixture.begin_step(len(groups), rounds)
    strata = torch.tensor(plan.strata, device=device)[here.groups]
    for (expert, _), rows in zip(groups, rows_of, strict=True):
        mixture.begin_expert(expert)
        for part in torch.split(rows.nonzero()[:, 0], micro):
            timesteps = here.timesteps[part]
            noisy = model.process.add_noise(latents[part], noise[part], timesteps)
            output = model.network(noisy, model.process.network_timesteps(timesteps), labels[part])
            loss = model.process.loss(output, latents[part], noise[part], timesteps)
            torch.autograd.backward((loss.total * here.weights[part]).sum())
            mixture.collect()
            window.add_losses(strata[part], loss.total, loss.mse)


def expert_groups(model: RemixDiT, strata: tuple[int, ...]) -> Iterator[tuple[int, list[int]]]:
    """Yield each expert of a step with the groups of images that are its own."""
    if model.num_experts == 1:
        yield 0, list(range(len(strata)))
    else:
        yield from ((expert, [group]) for group, expert in enumerate(strata))


def step_noise(latents: Tensor, positions: Tensor, config: TrainConfig, step: int) -> Tensor:
    """Return the noise of these images, drawn for the batch of all processes."""
    shape = (config.batch_size, *latents.shape[1:])
    noise = torch.randn(shape, generator=generator_for(config.seed, "noise", step))
    return noise[positions]


def dropped_labels(batch: Batch, num_classes: int, config: TrainConfig, step: int) -> Tensor:
    """Return the labels, some replaced by the null label."""
    generator = generator_for(config.seed, "labels", step)
    dropped = torch.rand(config.batch_size, generator=generator) < config.objective.label_dropout
    return torch.where(dropped[batch.positions], num_classes, batch.class_labels)
