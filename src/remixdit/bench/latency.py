"""What a step of sampling costs: parameters, operations, and the time it takes here."""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from remixdit.model.describe import describe
from remixdit.model.model import RemixDiT
from remixdit.sampling.sampler import SamplingConfig, guided_output

__all__ = ["model_costs"]

WARMUPS, REPEATS = 3, 10


def model_costs(
    checkpoint: str, model: RemixDiT, sampling: SamplingConfig, ema: bool = True
) -> dict[str, Any]:
    """Return parameters, floating-point operations and latency, as JSON values.

    Args:
        checkpoint: Where the model is from.
        model: As it samples, in its precision and on its device.
        sampling: With guidance, a step runs the network on twice the images.
        ema: The averaged weights of a checkpoint were taken.
    """
    facts: Mapping[str, Any] = describe(checkpoint, ema=ema)
    runs = 2 if sampling.guidance_scale > 1 else 1
    return {
        "parameters": facts["parameters"],
        "forward_flops_per_image": facts["forward_flops_per_image"],
        "training_flops_per_image": facts["training_flops_per_image"],
        "step_flops_per_image": runs * facts["forward_flops_per_image"],
        "step_latency": [
            step_latency(model, sampling, size) for size in sorted({1, sampling.batch_size})
        ],
    }


def step_latency(model: RemixDiT, sampling: SamplingConfig, batch_size: int) -> dict[str, Any]:
    """Return the time of one step of one expert, mixed already, guided where guidance acts."""
    network = model.config.network
    shape = (batch_size, network.in_channels, network.input_size, network.input_size)
    latents = torch.zeros(shape, device=model.device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=model.device)
    middle = sum(sampling.guidance_interval) / 2 * model.intervals.boundaries[-1]
    timestep = middle if model.intervals.is_continuous else min(int(middle), last_timestep(model))
    expert = int(model.intervals.expert_at(torch.tensor([timestep])))
    seconds = []
    with torch.no_grad():
        for _ in range(WARMUPS + REPEATS):
            started = time.perf_counter()
            guided_output(model, sampling, expert, latents, timestep, labels)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(1000 * (time.perf_counter() - started))
    timed = sorted(seconds[WARMUPS:])
    quarter = len(timed) // 4
    return {
        "batch_size": batch_size,
        "median_ms": median(timed),
        "quartiles_ms": [timed[quarter], timed[-1 - quarter]],
        "steps": REPEATS,
    }


def last_timestep(model: RemixDiT) -> int:
    """Return the noisiest timestep of a discrete process."""
    return int(model.intervals.boundaries[-1]) - 1
