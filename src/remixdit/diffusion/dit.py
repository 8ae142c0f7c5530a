"""The diffusion transformer: DiT with adaLN-Zero blocks (arXiv:2212.09748).

    tokens = patches(latents) + positions
    conditioning = embed(timesteps) + embed(class_labels)
    tokens = tokens + gate * f(norm(tokens) * (1 + scale) + shift),   f = attention, then MLP

where shift, scale and gate are linear in the conditioning. The parameters carry the names of the
published checkpoints, so that those load as they are.

Shapes: B batch, T tokens, D hidden size, C H W latents, P patch size.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from remixdit.seeds import generator_for

__all__ = ["SIZES", "TIMESTEP_EMBEDDINGS", "DiT", "DiTConfig"]

# name: (depth, hidden_size, num_heads), table 1 of arXiv:2212.09748
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}

FREQUENCY_SIZE = 256  # width of the sinusoidal embedding of a timestep
TIMESTEP_EMBEDDINGS = ("dit", "diffusers", "sit")


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of a DiT."""

    input_size: int = 32
    """Height and width of the latents."""
    patch_size: int = 2
    """Height and width of a patch, which divide input_size."""
    in_channels: int = 4
    """Number of channels of the latents."""
    hidden_size: int = 384
    """Width of a token, a multiple of num_heads and of 4."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 6
    """Number of attention heads."""
    mlp_ratio: float = 4.0
    """Width of the MLP's hidden layer over the width of a token."""
    num_classes: int = 1000
    """Number of classes; 0 for an unconditional network. The null label is num_classes."""
    learn_sigma: bool = True
    """Predict the variance as well as the mean, with twice the output channels."""
    timestep_embedding: str = "dit"
    """Embedding of a timestep: dit, diffusers (other frequencies) or sit (times of a SiT)."""

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        for name in (
            "input_size",
            "patch_size",
            "in_channels",
            "hidden_size",
            "depth",
            "num_heads",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.timestep_embedding not in TIMESTEP_EMBEDDINGS:
            raise ValueError(
                f"timestep_embedding must be one of {', '.join(TIMESTEP_EMBEDDINGS)}, "
                f"got {self.timestep_embedding!r}"
            )
        if not self.hidden_size * self.mlp_ratio >= 1:  # so that NaN fails too
            raise ValueError(f"mlp_ratio must give a hidden layer, got {self.mlp_ratio}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {self.num_classes}")
        if self.input_size % self.patch_size:
            raise ValueError(
                f"patch_size must divide input_size {self.input_size}, got {self.patch_size}"
            )
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size must be a multiple of 4 and of num_heads {self.num_heads}, "
                f"got {self.hidden_size}"
            )

    @classmethod
    def named(cls, name: str, **changes: Any) -> Self:
        """Return a published shape, such as "DiT-S/2" or "XL/4", with `changes` applied.

        Args:
            name: Size S, B, L or XL and patch 2, 4 or 8 (any patch that divides the input).
            changes: Other fields, e.g. `num_classes=10`.
        """
        size, _, patch = name.upper().removeprefix("DIT-").partition("/")
        if size not in SIZES or not patch.isdigit():
            raise ValueError(f"name must be a size of {', '.join(SIZES)} and a patch, got {name!r}")
        depth, hidden_size, num_heads = SIZES[size]
        config = cls(
            input_size=changes.pop("input_size", 32),
            patch_size=int(patch),
            depth=depth,
            hidden_size=hidden_size,
            num_heads=num_heads,
        )
        return replace(config, **changes)

    @property
    def out_channels(self) -> int:
        """Channels of the output: mean, then variance if it is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return (self.input_size // self.patch_size) ** 2


class DiT(nn.Module):
    """A diffusion transformer. It never hears of mixing.

    Args:
        config: Shape of the network.
        seed: Seed of the initial weights.

    Attributes:
        recompute: Whether only the input of each block is kept for the backward pass, which then
            runs the block again: less memory, a third more arithmetic, the same gradients.
    """

    float32_modules = ("t_embedder", "y_embedder", "final_layer")
    """Parts that stay in float32 when the rest is bfloat16: few weights, but sensitive ones."""

    pos_embed: Tensor

    def __init__(self, config: DiTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        width = config.hidden_size
        self.x_embedder = PatchEmbed(config.in_channels, width, config.patch_size)
        self.t_embedder = TimestepEmbedder(width, config.timestep_embedding)
        if config.num_classes:
            self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.blocks = nn.ModuleList(
            Block(width, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(width, config.patch_size**2 * config.out_channels)
        # A function of the shape alone: neither trained nor saved.
        positions = sincos_positions(width, config.input_size // config.patch_size)
        self.register_buffer("pos_embed", positions[None], persistent=False)  # (1, T, D)
        if not self.x_embedder.proj.weight.is_meta:
            initialize(self, generator_for(seed, "weights"))

    def forward(
        self, latents: Tensor, timesteps: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Predict noise or velocity, whichever the network is trained for.

        Args:
            latents: (B, C, H, W) noisy latents.
            timesteps: (B,) integers or floats in [0, 1000).
            class_labels: (B,) integers in [0, num_classes], num_classes is the null label;
                not used by an unconditional network.

        Returns:
            (B, out_channels, H, W) float32 (or wider); the variance channels come second.
        """
        kind = latents.device.type
        # In float32, also where the rest is bfloat16: few weights, but sensitive ones.
        with torch.autocast(kind, enabled=False):
            conditioning = self.conditioning(timesteps, class_labels)  # (B, D)
        latents = latents.to(self.x_embedder.proj.weight.dtype)
        tokens = self.x_embedder(latents)  # (B, T, D)
        tokens = tokens + self.pos_embed.to(tokens.dtype)
        modulation = conditioning.to(tokens.dtype)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                tokens = run_again(block, tokens, modulation)
            else:
                tokens = block(tokens, modulation)
        with torch.autocast(kind, enabled=False):
            tokens = self.final_layer(tokens.to(conditioning.dtype), conditioning)
        return self.unpatchify(tokens)

    def conditioning(self, timesteps: Tensor, class_labels: Tensor | None) -> Tensor:
        """Embed timesteps (B,) and labels (B,) => (B, D)."""
        embedded = self.t_embedder(timesteps)
        if not self.config.num_classes:
            return embedded
        if class_labels is None:
            raise ValueError(f"class_labels are needed by {self.config.num_classes} classes")
        return embedded + self.y_embedder(class_labels)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Lay patches out as an image: (B, T, P*P*C) => (B, C, H, W)."""
        side, patch = self.config.input_size // self.config.patch_size, self.config.patch_size
        patches = tokens.reshape(-1, side, side, patch, patch, self.config.out_channels)
        return torch.einsum("bhwpqc->bchpwq", patches).flatten(4, 5).flatten(2, 3)


class Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the conditioning."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """Transform tokens (B, T, D) under conditioning (B, D)."""
        modulation = self.adaLN_modulation(conditioning)[:, None]  # (B, 1, 6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=2)
        tokens = tokens + gate1 * self.attn(modulate(self.norm1(tokens), shift1, scale1))
        return tokens + gate2 * self.mlp(modulate(self.norm2(tokens), shift2, scale2))


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend: (B, T, D) => (B, T, D)."""
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, D/heads)
        return self.proj(attend(query, key, value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linears around a GELU (its tanh form)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform each token: (B, T, D) => (B, T, D)."""
        return self.fc2(F.gelu(self.fc1(tokens), approximate="tanh"))


class FinalLayer(nn.Module):
    """A modulated norm and the linear to pixels of a patch."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """Project: (B, T, D) => (B, T, out_features)."""
        shift, scale = self.adaLN_modulation(conditioning)[:, None].chunk(2, dim=2)
        return self.linear(modulate(self.norm_final(tokens), shift, scale))


class PatchEmbed(nn.Module):
    """A linear map of each patch to a token."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        """Embed: (B, C, H, W) => (B, T, D), row by row."""
        return self.proj(latents).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep, then an MLP.

    Args:
        width: Width of the result.
        kind: "dit" for the frequencies of arXiv:2212.09748; "diffusers" for those of its
            `DiTTransformer2DModel`; "sit" for those of a DiT, but of the time 1 - timestep / 1000
            (arXiv:2401.08740, as it is trained).
    """

    def __init__(self, width: int, kind: str = "dit") -> None:
        super().__init__()
        self.kind = kind
        first = nn.Linear(FREQUENCY_SIZE, width)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        """Embed: (B,) => (B, D)."""
        if self.kind == "sit":
            timesteps = 1 - timesteps / 1000
        shift = 1 if self.kind == "diffusers" else 0
        frequencies = timestep_frequencies(timesteps, FREQUENCY_SIZE, shift)
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(frequencies.to(dtype))


class LabelEmbedder(nn.Module):
    """One vector for each class, and a last one for the null label."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, class_labels: Tensor) -> Tensor:
        """Embed: (B,) => (B, D)."""
        return self.embedding_table(class_labels)


def run_again(block: nn.Module, tokens: Tensor, conditioning: Tensor) -> Tensor:
    """Run a block whose inner activations are not kept but computed again for the gradients."""
    # Nothing in a block is random, so no state of a generator need be kept.
    return checkpoint(block, tokens, conditioning, use_reentrant=False, preserve_rng_state=False)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(query key^T / sqrt(width)) value, all (B, heads, T, width)."""
    if query.is_cpu and query.dtype == torch.bfloat16:
        # torch's fused attention on a CPU takes 8 times as long in the bfloat16 backward pass.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        return scores.softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale normed tokens (B, T, D) by (B, 1, D) each."""
    return tokens * (1 + scale) + shift


def timestep_frequencies(timesteps: Tensor, size: int, shift: int = 0) -> Tensor:
    """Return cosines, then sines, of the timesteps at `size / 2` periods from 2 pi to 2e4 pi.

    Args:
        timesteps: (B,) integers or floats.
        size: Number of features, even.
        shift: Frequency i is 10000^(-i / (size / 2 - shift)).

    Returns:
        (B, size) float32: a bfloat16 could not tell timestep 999 from 1000.
    """
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * steps / (half - shift))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def sincos_positions(width: int, side: int) -> Tensor:
    """Return the fixed embedding of a `side` x `side` grid: (T, D) float32, row by row.

    The first half of the features encodes the column, the second the row; each is sines, then
    cosines, at D/4 frequencies (appendix of arXiv:2212.09748). Computed in float64.
    """
    quarter = width // 4
    # On the CPU also where the weights are made without storage, on the meta device.
    steps = torch.arange(max(quarter, side), dtype=torch.float64, device="cpu")
    omega = 10000.0 ** -(steps[:quarter] / quarter)
    angles = steps[:side, None] * omega  # (side, D/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)  # (T, D/2)
    return torch.cat([columns, rows], dim=1).float()


@torch.no_grad()
def initialize(network: DiT, generator: torch.Generator) -> None:
    """Draw the initial weights (section 3.2 of arXiv:2212.09748).

    Xavier for linears; normal(0.02) for the embeddings of timestep and label; zero for the
    modulations and the last linear, so that every block starts as the identity.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            # A convolution over patches is a linear of flattened patches.
            nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    normal = [linear for linear in network.t_embedder.mlp if isinstance(linear, nn.Linear)]
    tables = [table for table in network.modules() if isinstance(table, nn.Embedding)]
    embedders: list[nn.Linear | nn.Embedding] = [*normal, *tables]
    for embedder in embedders:
        nn.init.normal_(embedder.weight, std=0.02, generator=generator)
    modulations = [
        m.adaLN_modulation for m in network.modules() if isinstance(m, Block | FinalLayer)
    ]
    for parameter in nn.ModuleList(modulations).parameters():
        nn.init.zeros_(parameter)
    nn.init.zeros_(network.final_layer.linear.weight)
