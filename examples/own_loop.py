"""Train timestep experts of a diffusers model in a loop of your own: any module, any optimizer.

python examples/own_loop.py unet|dit [--steps 20] [--compile]
"""

import argparse

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel

from remixdit import remix

parser = argparse.ArgumentParser()
parser.add_argument("network", choices=["unet", "dit"])
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--compile", action="store_true")
arguments = parser.parse_args()
torch.manual_seed(0)

if arguments.network == "unet":
    network = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1,
        block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    experts = remix(network, num_bases=2, num_experts=5, mixed="*resnets*conv*,*to_q.*,*to_v.*")
else:
    network = DiTTransformer2DModel(
        sample_size=16, in_channels=3, out_channels=3, num_layers=2, patch_size=4,
        num_attention_heads=2, attention_head_dim=32, num_embeds_ada_norm=1000,
    )  # fmt: skip
    experts = remix(network, num_bases=2, num_experts=5)  # its linears of attention and MLP
if arguments.compile:
    network.compile()

# --- from here on, a training loop like any other
width, expert_of_image = 200, torch.arange(5).repeat_interleave(4)  # 4 images of every expert
scheduler = DDPMScheduler(num_train_timesteps=1000)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
images = torch.rand(20, 3, 16, 16) * 2 - 1
labels = {"class_labels": torch.zeros(20, dtype=torch.long)} if arguments.network == "dit" else {}
for step in range(arguments.steps):
    timesteps = expert_of_image * width + torch.randint(width, (20,))
    noise = torch.randn_like(images)
    noisy_images = scheduler.add_noise(images, noise, timesteps)
    with experts.route(expert_of_image):
        output = network(noisy_images, timesteps, **labels).sample
    loss = F.mse_loss(output, noise)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}, loss {loss.item():.4f}")

plain = experts.plain(4)  # the noisiest expert, of the class that it was before
print(f"expert 4 is a {type(plain).__name__} of {sum(p.numel() for p in plain.parameters()):,}")
