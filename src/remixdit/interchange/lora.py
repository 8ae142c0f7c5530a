"""The experts of low-rank bases as LoRA files, for diffusers' DiT.

    weights[n] = weight + lora_B[n] @ lora_A,    lora_A = down,    lora_B[n] = coefficients[n] up

Shapes: K bases, r their rank, N experts, I in, O out.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from remixdit.files import new_directory, save_tensors
from remixdit.interchange.layout import require_embedding
from remixdit.model.diffusers_dit import BLOCK_NAMES, OUTER_NAMES
from remixdit.model.model import RemixDiT

__all__ = ["export_lora"]


def export_lora(model: RemixDiT, directory: str | Path) -> None:
    """Write a file for each expert, and `experts.json`: the timesteps that each owns.

    Args:
        model: A model with low-rank bases.
        directory: New or empty.
    """
    if not model.config.rank:
        raise ValueError("rank must be at least 1 for format lora, got 0: the bases are whole")
    require_embedding(model.config, "dit", "diffusers")
    rank, bounds = model.num_bases * model.config.rank, model.intervals.boundaries
    entries = []
    with new_directory(Path(directory)) as beside:
        for expert in range(model.num_experts):
            name = f"expert-{expert:03d}.safetensors"
            save_tensors(lora_state(model, expert), beside / name, format="pt")
            owned = {"begin": bounds[expert], "end": bounds[expert + 1]}
            entries.append({"file": name, **owned})  # begin <= timestep < end
        about = {
            "format_version": 1,
            "experts": entries,
            "rank": rank,
            "lora_alpha": rank,
            "prediction_type": model.config.prediction_type,
            "num_train_timesteps": model.config.num_train_timesteps,
            "license": model.config.license,
        }
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        (beside / "experts.json").write_text(text, "utf-8")


def lora_state(model: RemixDiT, expert: int) -> dict[str, Tensor]:
    """Return `transformer.<layer>.lora_A.weight` (K r, I) and `lora_B.weight` (O, K r)."""
    own_state, state = model.experts.lora(expert), {}
    for own in model.experts.mixed:
        down, up = (own_state[f"{own}.lora_{part}.weight"] for part in "AB")
        names = list(names_of(own, model.config.network.depth))
        for name, part in zip(
            names, up.chunk(3) if own.endswith("qkv") else [up] * len(names), strict=True
        ):
            state[f"transformer.{name}.lora_A.weight"] = down.cpu().clone()
            state[f"transformer.{name}.lora_B.weight"] = part.cpu().clone()
    return state


def names_of(own: str, depth: int) -> Iterator[str]:
    """Yield diffusers' names of one of our linears; there are many of qkv and of the embedder."""
    for name, ours in OUTER_NAMES.items():
        if ours == own:
            yield name
    for block in range(depth):
        prefix = f"transformer_blocks.{block}"
        if own == f"blocks.{block}.attn.qkv":
            yield from (f"{prefix}.attn1.to_{letter}" for letter in "qkv")
        for name, ours in BLOCK_NAMES.items():
            if ours.format(block) == own:
                yield f"{prefix}.{name}"
