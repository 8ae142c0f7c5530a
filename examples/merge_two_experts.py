"""Put two networks, each trained on its own half of the noise, into one model; then average them.

python examples/merge_two_experts.py [--steps 150] [--output two_experts]

Two runs for Wan2.2 leave such a pair: one network for high noise, one for low noise, and the share
of the timesteps at which they meet, `boundary_ratio`. Here both are tiny, and begin as copies of
one network that was trained on all timesteps.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor

from remixdit import DiT, DiTConfig, RemixDiT
from remixdit.data.autoencoder import load_autoencoder
from remixdit.diffusion.noise import Diffusion
from remixdit.figures.grids import image_grid
from remixdit.model.merging import merged, shares
from remixdit.sampling.sampler import SamplingConfig, sample

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--output", type=Path, default=Path("two_experts"))
arguments = parser.parse_args()
BOUNDARY_RATIO = 0.4
process = Diffusion("v_prediction", learn_sigma=False)
generator = torch.Generator().manual_seed(0)


def discs(count: int) -> tuple[Tensor, Tensor]:
    """Draw light discs (class 0) and dark ones (class 1): (B, 1, 8, 8) in [-1, 1], (B,)."""
    grid = torch.arange(8.0)
    center, radius = 2 + 4 * torch.rand(2, count, 1, 1, generator=generator), 2.5
    distance = ((grid[:, None] - center[0]) ** 2 + (grid - center[1]) ** 2).sqrt()
    labels = torch.randint(2, (count,), generator=generator)
    sign = 1 - 2 * labels.view(-1, 1, 1)
    return (sign * (radius - distance).clamp(-1, 1))[:, None], labels


def losses(model: RemixDiT, count: int, first: int, end: int) -> Tensor:
    """Return (B,) losses at timesteps in [first, end), with gradients."""
    images, labels = discs(count)
    timesteps = torch.randint(first, end, (count,), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    output = model(process.add_noise(images, noise, timesteps), timesteps, labels)
    return process.loss(output, images, noise, timesteps).total


def train(network: DiT, first: int = 0, end: int = 1000) -> RemixDiT:
    """Train a network on timesteps in [first, end); return it as a model of one expert."""
    model = RemixDiT.from_dit(network, 1, 1, prediction_type="v_prediction")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(arguments.steps):
        losses(model, 64, first, end).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


shape = DiTConfig(
    input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2,
    num_classes=2, learn_sigma=False,
)  # fmt: skip
start = train(DiT(shape))
middle = int(1000 * BOUNDARY_RATIO)
low = train(copy.deepcopy(start.expert(0)), end=middle)
high = train(copy.deepcopy(start.expert(0)), first=middle)

# --- the least noisy first; in the place of models there may be DiTs
model = RemixDiT.from_experts([low, high], boundary_ratio=BOUNDARY_RATIO).eval()
model.save_pretrained(arguments.output / "both")
average = merged(model, shares(model))  # one plain network: the mean by share of the timesteps
average.save_pretrained(arguments.output / "average")

for name, each in {
    "start": start,
    "low": low,
    "high": high,
    "both": model,
    "mean": average,
}.items():
    generator.manual_seed(1)  # all are measured on the same images, timesteps and noise
    with torch.no_grad():
        parts = [losses(each, 2000, 0, middle).mean(), losses(each, 2000, middle, 1000).mean()]
    print(f"{name:6} loss {parts[0]:.4f} below the boundary, {parts[1]:.4f} above")

config = SamplingConfig(
    num_images=16, class_labels=(0, 1), scheduler="ddim", num_inference_steps=25
)
(samples,) = sample(model, load_autoencoder(None), config)
image_grid(samples.images, 8).save(arguments.output / "samples.png")
print(
    f"look at {arguments.output / 'samples.png'}; {arguments.output / 'both'} is a model directory"
)
