"""Fine-tune a large transformer with low-rank experts: one LoRA for each interval of timesteps.

python examples/low_rank.py [--steps 30] [--output loras]

The transformer of Stable Diffusion 3, here tiny and random, stays frozen in bfloat16. Its linears
of attention and MLP get K = 2 bases of rank 16, which are mixed into N = 4 experts. For the real
one, load it with `from_pretrained`, and take latents and prompts from your data.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file

from remixdit import remix

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--output", type=Path, default=Path("loras"))
arguments = parser.parse_args()
torch.manual_seed(0)

transformer = SD3Transformer2DModel(
    sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=32,
    num_attention_heads=4, caption_projection_dim=128, joint_attention_dim=64,
    pooled_projection_dim=64, pos_embed_max_size=8,
).bfloat16()  # fmt: skip
frozen = sum(parameter.numel() for parameter in transformer.parameters())
experts = remix(transformer, num_bases=2, num_experts=4, rank=16)
trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
print(f"{frozen:,} frozen parameters, {sum(p.numel() for p in trained):,} to train")

# --- a training loop like any other: flow matching, where t = 0 is data and t = 1 is noise
optimizer = torch.optim.AdamW(trained, lr=3e-3)
expert_of_image = torch.arange(4).repeat_interleave(4)  # 4 images of every expert
latents = torch.randn(16, 4, 8, 8)
prompts, pooled = torch.randn(16, 7, 64).bfloat16(), torch.randn(16, 64).bfloat16()
for step in range(arguments.steps):
    times = (expert_of_image + torch.rand(16)) / 4  # (B,), expert n owns n / 4 <= t < (n + 1) / 4
    noise = torch.randn_like(latents)
    noisy_latents = torch.lerp(latents, noise, times.view(-1, 1, 1, 1))
    with experts.route(expert_of_image):
        velocity = transformer(
            hidden_states=noisy_latents.bfloat16(),
            encoder_hidden_states=prompts,
            pooled_projections=pooled,
            timestep=1000 * times,
        ).sample
    loss = F.mse_loss(velocity.float(), noise - latents)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}, loss {loss.item():.4f}")

# --- a file for each expert, which diffusers adds to the network that it was trained on:
# transformer.load_lora_adapter("loras", weight_name="expert-3.safetensors", prefix=None)
arguments.output.mkdir(parents=True, exist_ok=True)
owned = {}
for expert in range(4):
    file = f"expert-{expert}.safetensors"
    save_file(experts.lora(expert), arguments.output / file)
    owned[file] = {"begin": 250 * expert, "end": 250 * (expert + 1)}  # begin <= timestep < end
(arguments.output / "experts.json").write_text(json.dumps(owned, indent=2) + "\n")
print(f"wrote {', '.join(owned)} and experts.json to {arguments.output}")

plain = experts.plain(3)  # or the whole network of an expert, of the class that it was before
print(f"expert 3 is a {type(plain).__name__} of {sum(p.numel() for p in plain.parameters()):,}")
