"""One training step: the plan, drawn from (seed, step), and the gradients.

The plan is made for the batch of all processes, and each takes its share, so losses do not depend
on how many there are. Image i of the batch belongs to group i mod M, so that every process holds
some images of every expert.

Shapes: B = batch_size over all processes, M experts of a step, C H W latents, N experts.
"""

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from remixdit import distributed
from remixdit.data import Batch
from remixdit.diffusion.intervals import Intervals
from remixdit.first.optim import StepStats
from remixdit.first.stacking import ExpertStack, Order
from remixdit.first.step_gradients import StepGradients
from remixdit.model.model import RemixDiT
from remixdit.seeds import generator_for
from remixdit.training.config import TrainConfig

__all__ = ["Inputs", "StepPlan", "Window", "plan_step", "step_inputs", "train_step"]


class StepPlan(NamedTuple):
    """What a step does with each image, for the batch of all processes."""

    step: int
    """In [0, steps)."""
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
    return StepPlan(step, draw.experts, groups, timesteps, weights)


class Window:
    """Sums over the steps since the last line of metrics, kept on the device."""

    def __init__(self, num_intervals: int, device: torch.device) -> None:
        self.losses = torch.zeros(3, num_intervals, device=device)  # total, mse, count
        self.stats = torch.zeros(3, device=device)
        self.steps = 0
        self.last_grad_norm = torch.zeros((), device=device)
        self.started = time.perf_counter()

    def add_losses(self, strata: Tensor, total: Tensor, mse: Tensor) -> None:
        """Add the losses (B,) of images of the intervals `strata` (B,)."""
        rows = torch.stack([total, mse, torch.ones_like(mse)]).detach()
        self.losses.index_add_(1, strata, rows.float())

    def add_stats(self, stats: StepStats) -> None:
        """Add what the optimizer saw."""
        self.stats += torch.stack(list(stats))
        self.last_grad_norm = stats.grad_norm
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


class Inputs(NamedTuple):
    """One process's share of a step, on its device; b images."""

    first: int
    """Place of the first image in the batch of all processes; the others follow."""
    latents: Tensor
    """(b, C, H, W) clean."""
    noise: Tensor
    """(b, C, H, W)."""
    timesteps: Tensor
    """(b,)."""
    class_labels: Tensor
    """(b,) some dropped."""
    weights: Tensor
    """(b,) in the loss."""
    strata: Tensor
    """(b,) the interval of each timestep."""

    def rows(self, index: Tensor) -> "Inputs":
        """Return some of the images."""
        return Inputs(self.first, *(values[index] for values in self[1:]))


def step_inputs(model: RemixDiT, batch: Batch, plan: StepPlan, config: TrainConfig) -> Inputs:
    """Draw what a step needs beside the images, and bring it to the device."""
    here, device = batch.positions, model.device
    strata = torch.tensor(plan.strata)[plan.groups]
    host = (
        batch.latents,
        step_noise(batch.latents, here, config, plan.step),
        plan.timesteps[here],
        dropped_labels(batch, model.config.network.num_classes, config, plan.step),
        plan.weights[here],
        strata[here],
    )
    tensors = (values.to(device, non_blocking=True) for values in host)
    return Inputs(int(here[0]), *tensors)


def train_step(
    model: RemixDiT,
    gradients: StepGradients,
    inputs: Inputs,
    plan: StepPlan,
    window: Window,
    stack: ExpertStack | None = None,
    micro_batch_size: int = 0,
) -> None:
    """Run and back-propagate one process's share of a step.

    Args:
        model: To train.
        gradients: Take in those of its mixture.
        inputs: b images.
        plan: Of the step.
        window: Takes in the losses.
        stack: Runs all experts in one pass; without it they take turns.
        micro_batch_size: Images run at once, without a stack; 0 for all.
    """
    model.network.train()
    experts = (0,) if model.num_experts == 1 else plan.strata
    if stack is not None:
        stacked_pass(model, inputs, experts, window, stack)
        return
    largest = -(-len(inputs.latents) // len(experts))
    micro = micro_batch_size or largest
    rounds = -(-largest // micro)
    gradients.begin_step(len(experts), rounds)
    for group, expert in enumerate(experts):
        gradients.begin_expert(expert)
        places = group_rows(group, len(experts), inputs)
        parts = torch.split(places, micro) if len(places) else ()
        for part in parts:
            own = inputs.rows(part)
            timesteps = model.process.network_timesteps(own.timesteps)
            noisy = model.process.add_noise(own.latents, own.noise, own.timesteps)
            output = model.network(noisy, timesteps, own.class_labels)
            back_propagate(model, output, own, window)
            gradients.collect()
        for _ in range(rounds - len(parts)):  # every process collects as often as the others
            gradients.collect()


def stacked_pass(
    model: RemixDiT,
    inputs: Inputs,
    experts: tuple[int, ...],
    window: Window,
    stack: ExpertStack,
) -> None:
    """Run all experts of a step at once, each on its own rows of the batch."""
    order = Order.of(inputs.first, len(inputs.latents), len(experts), model.device)
    own = inputs.rows(order.rows)
    timesteps = model.process.network_timesteps(own.timesteps)
    noisy = model.process.add_noise(own.latents, own.noise, own.timesteps)
    stack.begin_step(experts)
    output = stack(order, noisy, timesteps, own.class_labels)
    back_propagate(model, output, own, window)
    stack.end_step()


def group_rows(group: int, num_groups: int, inputs: Inputs) -> Tensor:
    """Return which of a process's images belong to a group: those at i mod M = group."""
    start, device = (group - inputs.first) % num_groups, inputs.latents.device
    return torch.arange(start, max(start, len(inputs.latents)), num_groups, device=device)


def back_propagate(model: RemixDiT, output: Tensor, own: Inputs, window: Window) -> None:
    """Weigh the losses of some images, add them to the window and go back."""
    loss = model.process.loss(output, own.latents, own.noise, own.timesteps)
    torch.autograd.backward((loss.total * own.weights).sum())
    window.add_losses(own.strata, loss.total, loss.mse)


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
