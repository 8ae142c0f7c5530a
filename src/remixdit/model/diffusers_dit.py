"""A DiT that diffusers saved, as a `RemixDiT` of one expert.

    config.json, diffusion_pytorch_model.safetensors     a DiTTransformer2DModel
    model_index.json, transformer/, scheduler/, vae/     a DiTPipeline
    remixdit.json                                        what one of our exports adds

diffusers embeds a timestep at the frequencies 10000^(-i / 127), i = 0..127, the published DiT at
10000^(-i / 128). A directory is read as the class that it names computes it, so outputs are equal.
"""

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remixdit.diffusion.dit import DiTConfig
from remixdit.model.config import RemixConfig
from remixdit.model.model import RemixDiT
from remixdit.model.validation import fits, json_object, shown
from remixdit.model.validation import wanted as wanted_type
from remixdit.model.weights import read_weights

__all__ = [
    "BLOCK_NAMES",
    "FACTS_FILE",
    "OUTER_NAMES",
    "diffusers_config",
    "is_diffusers",
    "load_diffusers",
]

# diffusers' names of what is in every block, and ours
BLOCK_NAMES = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.linear": "blocks.{}.adaLN_modulation.1",
    "attn1.to_out.0": "blocks.{}.attn.proj",
    "ff.net.0.proj": "blocks.{}.mlp.fc1",
    "ff.net.2": "blocks.{}.mlp.fc2",
}
OUTER_NAMES = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
LABELS = "norm1.emb.class_embedder.embedding_table.weight"

# The embedding of timesteps of each class. The first releases of the published weights have the
# second name.
EMBEDDINGS = {
    "DiTTransformer2DModel": "diffusers",
    "Transformer2DModel": "diffusers",
    "RemixExpertTransformer": "dit",
}
FACTS_FILE = "remixdit.json"
WEIGHTS = "diffusion_pytorch_model"

# What a DiT of ours is not told by its configuration, and the defaults of diffusers.
REQUIRED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}

# Numbers that are calculated with before they are part of a configuration that is checked.
TYPES = {
    "norm_eps": float,
    "num_attention_heads": int,
    "attention_head_dim": int,
    "in_channels": int,
    "out_channels": int | None,
    "sample_size": int,
    "patch_size": int,
    "num_layers": int,
    "num_embeds_ada_norm": int,
}


def is_diffusers(directory: Path) -> bool:
    """Whether a directory was saved by diffusers: a pipeline, or a transformer alone."""
    if (directory / "model_index.json").is_file():
        return True
    path = directory / "config.json"
    return path.is_file() and '"_class_name"' in path.read_text("utf-8", errors="replace")


def load_diffusers(directory: Path) -> RemixDiT:
    """Return the model of a directory that `is_diffusers`."""
    config = diffusers_config(directory)
    model = RemixDiT.empty(config)
    state = our_state(saved_weights(transformer_of(directory)), config.network, directory)
    weights = {"logits": torch.zeros(1, 1)}
    for key, name in model.experts.disk_names().items():
        if name != "logits":
            weights[name] = state[key][None] if name.startswith("bases.") else state[key]
    model.load_weights(weights)
    return model.eval()


def transformer_of(directory: Path) -> Path:
    """Return the directory of the network: the given one, or that inside of a pipeline."""
    is_pipeline = (directory / "model_index.json").is_file()
    return directory / "transformer" if is_pipeline else directory


def diffusers_config(directory: Path) -> RemixConfig:
    """Return the configuration of a model that diffusers saved."""
    values = json_object(transformer_of(directory) / "config.json")
    facts = json_object(directory / FACTS_FILE) if (directory / FACTS_FILE).is_file() else {}
    network = network_config(values, directory)
    scheduler = directory / "scheduler" / "scheduler_config.json"
    noise = noise_settings(json_object(scheduler), scheduler) if scheduler.is_file() else {}
    plain = RemixConfig(network=network, num_bases=1, num_experts=1, class_names=()).to_json()
    stated = {
        "prediction_type": "epsilon",
        "num_train_timesteps": 1000,
        **noise,
        **{name: value for name, value in facts.items() if value},
    }
    stated.setdefault("class_names", labels_in(directory, network.num_classes))
    stated.setdefault("autoencoder", autoencoder_in(directory))
    stated.setdefault("license", license_in(directory))
    # As JSON values, which are checked as those of our own files are.
    own = {"network": plain["network"], "num_bases": 1, "num_experts": 1, "boundaries": None}
    return RemixConfig.from_json({**plain, **stated, **own})


def network_config(values: Mapping[str, Any], directory: Path) -> DiTConfig:
    """Return the shape of the network that diffusers' configuration describes."""
    kind = values.get("_class_name")
    if kind not in EMBEDDINGS:
        raise ValueError(
            f"_class_name must be that of a DiT, DiTTransformer2DModel, got {kind} in {directory}"
        )
    for name, wanted in REQUIRED.items():
        if values.get(name, wanted) != wanted:
            raise ValueError(
                f"{name} must be {wanted} for a DiT, got {values[name]} in {directory}"
            )
    for name, hint in TYPES.items():
        if name in values and not fits(hint, values[name]):
            raise ValueError(
                f"{name} must be {wanted_type(hint)}, got {shown(values[name])} in {directory}"
            )
    # A DiT has 1e-6 in both norms of a block. 1e-5, diffusers' default for the second, changes
    # outputs by about 1e-5 of their size.
    if not 1e-6 <= values.get("norm_eps", 1e-5) <= 1e-5:
        raise ValueError(
            f"norm_eps must be from 1e-6 to 1e-5 for a DiT, got {values['norm_eps']} in {directory}"
        )
    heads, channels = values.get("num_attention_heads", 16), values.get("in_channels", 4)
    outputs = values.get("out_channels") or channels
    if outputs not in (channels, 2 * channels):
        raise ValueError(
            f"out_channels must be {channels}, or twice as many for a learned variance, "
            f"got {outputs} in {directory}"
        )
    return DiTConfig(
        input_size=values.get("sample_size", 32),
        patch_size=values.get("patch_size", 2),
        in_channels=channels,
        hidden_size=heads * values.get("attention_head_dim", 72),
        depth=values.get("num_layers", 28),
        num_heads=heads,
        mlp_ratio=4.0,
        num_classes=values.get("num_embeds_ada_norm", 1000),
        learn_sigma=outputs == 2 * channels,
        timestep_embedding=EMBEDDINGS[kind],
    )


def noise_settings(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return prediction type and T of a scheduler; refuse betas that are not ours."""
    steps = values.get("num_train_timesteps", 1000)
    if not fits(int, steps) or steps < 1:
        raise ValueError(f"num_train_timesteps must be at least 1, got {shown(steps)} in {path}")
    wanted = {
        "beta_schedule": "linear",
        "beta_start": 1e-4 * 1000 / steps,
        "beta_end": 0.02 * 1000 / steps,
        "trained_betas": None,
    }
    found = {name: values.get(name) for name in wanted}
    if found != wanted:
        raise ValueError(f"betas must be {wanted}, got {found} in {path}")
    return {
        "num_train_timesteps": steps,
        "prediction_type": values.get("prediction_type", "epsilon"),
    }


def labels_in(directory: Path, num_classes: int) -> tuple[str, ...]:
    """Return the class names of a pipeline, if it names all classes."""
    path = directory / "model_index.json"
    found = json_object(path).get("id2label") if path.is_file() else None
    names = found if isinstance(found, Mapping) else {}
    if names.keys() != {str(number) for number in range(num_classes)}:
        return ()
    return tuple(str(names[str(number)]) for number in range(num_classes))


def autoencoder_in(directory: Path) -> dict[str, Any]:
    """Return the autoencoder of a pipeline."""
    config = directory / "vae" / "config.json"
    if not config.is_file():
        return {"name": "none"}
    scale = json_object(config).get("scaling_factor")
    known = {} if scale is None else {"scaling_factor": float(scale)}
    return {"name": str(directory.resolve()), **known}


def license_in(directory: Path) -> str:
    """Return the licence that a model card states in its header, "" if it states none."""
    card = directory / "README.md"
    if not card.is_file():
        return ""
    _, _, rest = card.read_text("utf-8", errors="replace").partition("---\n")
    lines = rest.partition("\n---")[0].splitlines()
    stated = dict(
        line.split(": ", 1) for line in lines if line.startswith("license") and ": " in line
    )
    return (stated.get("license_name") or stated.get("license", "")).strip("\"'")


def saved_weights(directory: Path) -> dict[str, Tensor]:
    """Return the tensors that diffusers saved, in one file or several."""
    index = directory / f"{WEIGHTS}.safetensors.index.json"
    if index.is_file():
        places = json_object(index).get("weight_map")
        if not isinstance(places, Mapping) or not fits(tuple[str, ...], list(places.values())):
            raise ValueError(f"weight_map of {index} must name files, got {shown(places)}")
        files = sorted({Path(name).name for name in places.values()})
        return {n: v for name in files for n, v in read_weights(directory / name).items()}
    for kind in ("safetensors", "fp16.safetensors"):
        if (directory / f"{WEIGHTS}.{kind}").is_file():
            return read_weights(directory / f"{WEIGHTS}.{kind}")
    path = directory / f"{WEIGHTS}.bin"
    if not path.is_file():
        raise ValueError(f"checkpoint must hold {WEIGHTS}.safetensors or .bin, got {directory}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError) as error:
        raise ValueError(f"checkpoint must hold tensors and nothing else, got {path}") from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"checkpoint must hold tensors and nothing else, got {path}")
    return found


def our_state(theirs: dict[str, Tensor], network: DiTConfig, directory: Path) -> dict[str, Tensor]:
    """Return diffusers' weights under our names, in float32.

    Each of its blocks embeds timestep and label anew; ours have one embedder, so all must be equal.
    """
    left = {name: v.float() for name, v in theirs.items() if name != "pos_embed.pos_embed"}
    state: dict[str, Tensor] = {}
    for name, own in names_of(network.depth):
        if name not in left:
            raise ValueError(f"checkpoint must hold a DiT, got no {name} in {directory}")
        values = left.pop(name)
        if not torch.equal(state.setdefault(own, values), values):
            raise ValueError(
                f"{name} must be equal in all blocks, as a DiT embeds timestep and label once, "
                f"got other values than in block 0 in {directory}"
            )
    if left:
        raise ValueError(f"checkpoint must hold a DiT alone, got {min(left)} too in {directory}")
    for block in range(network.depth):
        for kind in ("weight", "bias"):
            place = f"blocks.{block}.attn"
            thirds = [state.pop(f"{place}.{letter}.{kind}") for letter in "qkv"]
            state[f"{place}.qkv.{kind}"] = torch.cat(thirds)
    return state


def names_of(depth: int) -> Iterator[tuple[str, str]]:
    """Yield the name of every tensor of diffusers with ours; q, k and v still apart."""
    pairs = dict(OUTER_NAMES)
    for block in range(depth):
        place = f"transformer_blocks.{block}"
        pairs |= {f"{place}.{name}": own.format(block) for name, own in BLOCK_NAMES.items()}
        pairs |= {f"{place}.attn1.to_{letter}": f"blocks.{block}.attn.{letter}" for letter in "qkv"}
        yield f"{place}.{LABELS}", "y_embedder.embedding_table.weight"
    for name, own in pairs.items():
        for kind in ("weight", "bias"):
            yield f"{name}.{kind}", f"{own}.{kind}"
