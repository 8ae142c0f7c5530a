"""The experts of a `RemixDiT` as plain networks, for other code to load.

dit        one expert, under the published names
experts    all experts likewise, and which timesteps each owns
diffusers  one expert as a model directory of diffusers
pipeline   all experts as a pipeline of diffusers (`pipelines`)
lora       the experts of low-rank bases as LoRA files (`lora`)
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from remixdit.diffusion.dit import DiT
from remixdit.files import new_directory, refuse_occupied, save_tensors
from remixdit.interchange.layout import official_state, require_embedding
from remixdit.interchange.lora import export_lora
from remixdit.interchange.pipelines import export_pipeline
from remixdit.model.card import license_lines
from remixdit.model.config import RemixConfig
from remixdit.model.diffusers_dit import BLOCK_NAMES, FACTS_FILE, OUTER_NAMES
from remixdit.model.loading import load_model
from remixdit.model.model import RemixDiT

__all__ = ["ExportConfig", "export_diffusers", "export_dit", "export_experts", "run_export"]

FORMATS = ("dit", "diffusers", "experts", "pipeline", "lora")
OF_ONE_EXPERT = ("dit", "diffusers")
FACTS = ("prediction_type", "num_train_timesteps", "class_names", "autoencoder", "license")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A model to export."""

    checkpoint: str
    """A model directory, a run, a checkpoint of a run, or a model on the Hugging Face Hub."""
    output: Path
    """Directory for the exported files; must be new or empty."""
    format: str = "dit"
    """dit, diffusers: one expert; experts: all, as dit; pipeline, lora: all, for diffusers."""
    expert: int | None = None
    """Index of the expert, in 0..N-1, for the formats dit and diffusers. Not needed for N = 1."""
    ema: bool = True
    """Use the averaged (EMA) weights of a checkpoint rather than its last ones."""

    def __post_init__(self) -> None:
        """Refuse formats and experts that cannot be exported."""
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        if self.format not in OF_ONE_EXPERT and self.expert is not None:
            raise ValueError(
                f"expert must not be given for format {self.format}, got {self.expert}"
            )


def run_export(config: ExportConfig) -> None:
    """Export a model; the output directory is written whole or not at all."""
    refuse_occupied(config.output)
    model = load_model(config.checkpoint, ema=config.ema)
    if config.format == "experts":
        export_experts(model, config.output)
    elif config.format == "lora":
        export_lora(model, config.output)
    elif config.format == "pipeline":
        export_pipeline(model, config.output)
    elif config.format == "diffusers":
        export_diffusers(model, config.output, config.expert)
    else:
        export_dit(model, config.output, config.expert)


def export_dit(model: RemixDiT, directory: str | Path, expert: int | None = None) -> Path:
    """Write one expert under the published names, `pos_embed` included: `dit.safetensors`.

    Args:
        model: Any; the networks of flow matching have the names of SiT, but time the other way.
        directory: New or empty.
        expert: In [0, N); not needed for N = 1.

    Returns:
        The file. `import_checkpoint` reads it back.
    """
    index = chosen_expert(model, expert)
    require_embedding(model.config, "dit")
    with new_directory(Path(directory)) as beside:
        write_dit(model, index, beside / "dit.safetensors")
    return Path(directory) / "dit.safetensors"


def export_experts(model: RemixDiT, directory: str | Path) -> None:
    """Write every expert under the published names, and `experts.json`: who owns which timesteps.

    Args:
        model: Any.
        directory: New or empty.
    """
    require_embedding(model.config, "dit")
    bounds, names = (
        model.intervals.boundaries,
        [f"expert-{n:03d}" for n in range(model.num_experts)],
    )
    experts = [
        {"file": f"{name}.safetensors", "begin": bounds[n], "end": bounds[n + 1]}
        for n, name in enumerate(names)
    ]
    settings = asdict(model.config)
    index = {
        "format_version": 1,
        "experts": experts,  # expert n owns begin <= timestep < end
        "network": settings["network"],
        **{name: settings[name] for name in FACTS},
    }
    with new_directory(Path(directory)) as beside:
        for number, name in enumerate(names):
            write_dit(model, number, beside / f"{name}.safetensors")
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (beside / "experts.json").write_text(text, "utf-8")


def export_diffusers(model: RemixDiT, directory: str | Path, expert: int | None = None) -> None:
    """Write one expert as a model directory of diffusers.

    It loads with `remixdit.interchange.remixdit_transformer.RemixExpertTransformer`, or with
    diffusers alone: `AutoModel.from_pretrained(directory, trust_remote_code=True)` runs the copy
    of that file. diffusers' own `DiTTransformer2DModel` loads it too, but embeds timesteps in
    another way than any DiT is trained with, so its output is only near. A model that came from
    diffusers goes back as that class, without code. `load_model` reads both.

    Args:
        model: A model with classes and an `mlp_ratio` of 4: diffusers has no other DiT.
        directory: New or empty.
        expert: In [0, N); not needed for N = 1.
    """
    from diffusers import DiTTransformer2DModel

    from remixdit.interchange import remixdit_transformer

    index, network = chosen_expert(model, expert), model.config.network
    if network.num_classes == 0:
        raise ValueError("num_classes must be at least 1 for diffusers, got 0")
    if network.mlp_ratio != 4:
        raise ValueError(f"mlp_ratio must be 4 for diffusers, got {network.mlp_ratio}")
    require_embedding(model.config, "dit", "diffusers")
    plain, stock = model.expert(index), network.timestep_embedding == "diffusers"
    kind = DiTTransformer2DModel if stock else remixdit_transformer.RemixExpertTransformer
    converted = kind(**diffusers_config(plain))
    converted.load_state_dict(diffusers_state(plain))
    with new_directory(Path(directory)) as beside:
        converted.save_pretrained(beside)
        for weights in beside.glob("*.safetensors"):  # written for their owner alone
            shutil.copymode(beside / "config.json", weights)
        if not stock:
            add_code(Path(remixdit_transformer.__file__), beside)
        write_facts(model.config, beside / FACTS_FILE)
        (beside / "README.md").write_text(diffusers_card(model.config, index), "utf-8")


def add_code(source: Path, directory: Path) -> None:
    """Copy the class of an exported network beside its weights, and let diffusers find it."""
    shutil.copyfile(source, directory / source.name)
    config = json.loads((directory / "config.json").read_text("utf-8"))
    config["auto_map"] = {"AutoModel": f"{source.stem}.RemixExpertTransformer"}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def write_facts(config: RemixConfig, path: Path) -> None:
    """Write what diffusers' configuration of a network cannot say, for a later import."""
    settings = asdict(config)
    facts = {name: settings[name] for name in FACTS}
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")


def chosen_expert(model: RemixDiT, expert: int | None) -> int:
    """Return the index of the expert to export."""
    if expert is None and model.num_experts == 1:
        return 0
    if expert is None or not 0 <= expert < model.num_experts:
        raise ValueError(
            f"expert must be in [0, {model.num_experts}) (--expert), "
            f"got {'none' if expert is None else expert}"
        )
    return expert


def write_dit(model: RemixDiT, expert: int, path: Path) -> None:
    """Write one expert under the published names; the header keeps facts beyond the shapes."""
    state = official_state(model.expert(expert))
    metadata = {
        "format": "pt",
        "num_heads": str(model.config.network.num_heads),
        "license": model.config.license,
        "expert": str(expert),
        "boundaries": json.dumps(model.intervals.boundaries[expert : expert + 2]),
        "prediction_type": model.config.prediction_type,
        "num_train_timesteps": str(model.config.num_train_timesteps),
        "class_names": json.dumps(model.config.class_names, ensure_ascii=False),
        "autoencoder": json.dumps(dict(model.config.autoencoder), ensure_ascii=False),
    }
    weights = {name: v.detach().cpu().contiguous() for name, v in state.items()}
    save_tensors(weights, path, **metadata)


def diffusers_config(network: DiT) -> dict[str, Any]:
    """Return the arguments of diffusers' DiT."""
    config = network.config
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,  # and one more row for the null label
        "norm_eps": 1e-6,  # its default of 1e-5 is not DiT's
    }


def diffusers_state(network: DiT) -> dict[str, Tensor]:
    """Return the weights under diffusers' names.

    There each block embeds timestep and label anew, so each gets a copy of our one embedder.
    """
    ours = network.state_dict()
    names = dict(OUTER_NAMES)
    state: dict[str, Tensor] = {}
    for block in range(network.config.depth):
        theirs = f"transformer_blocks.{block}"
        names |= {f"{theirs}.{name}": own.format(block) for name, own in BLOCK_NAMES.items()}
        table = ours["y_embedder.embedding_table.weight"]
        state[f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"] = table
        for kind in ("weight", "bias"):
            thirds = ours[f"blocks.{block}.attn.qkv.{kind}"].chunk(3)
            for letter, values in zip("qkv", thirds, strict=True):
                state[f"{theirs}.attn1.to_{letter}.{kind}"] = values
    for name, own in names.items():
        state |= {f"{name}.{kind}": ours[f"{own}.{kind}"] for kind in ("weight", "bias")}
    return state


def diffusers_card(config: RemixConfig, expert: int) -> str:
    """Return the README.md of an exported directory."""
    assert config.boundaries is not None
    begin, end = config.boundaries[expert : expert + 2]
    usage = STOCK_USAGE if config.network.timestep_embedding == "diffusers" else CODE_USAGE
    return (
        f"---\nlibrary_name: diffusers\n{license_lines(config.license)}---\n\n"
        f"# Expert {expert} of {config.num_experts}, for timesteps {begin} to {end}\n\n"
        f"{config.prediction_type}; the null label is {config.network.num_classes}.\n\n{usage}"
    )


CODE_USAGE = (
    "```python\nfrom diffusers import AutoModel\n\n"
    'model = AutoModel.from_pretrained("this directory", trust_remote_code=True)\n```\n\n'
    "The code that is trusted is `remixdit_transformer.py` in this directory: diffusers' class "
    "with the timestep frequencies of the original DiT. `DiTTransformer2DModel` loads these "
    "weights as well, but its frequencies differ, and so do its outputs.\n"
)
STOCK_USAGE = (
    "```python\nfrom diffusers import DiTTransformer2DModel\n\n"
    'model = DiTTransformer2DModel.from_pretrained("this directory")\n```\n'
)
