"""A `RemixDiT` as a pipeline of diffusers, which runs where remixdit is not installed."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from remixdit.data.autoencoder import LatentAutoencoder, load_autoencoder
from remixdit.files import file_digest, new_directory
from remixdit.interchange.layout import require_embedding
from remixdit.model.card import license_lines
from remixdit.model.config import RemixConfig
from remixdit.model.imagenet import shown_names
from remixdit.model.model import RemixDiT

__all__ = ["export_pipeline"]


def export_pipeline(model: RemixDiT, directory: str | Path) -> None:
    """Write all N experts, mixed when they are needed, as a pipeline of diffusers.

    `DiffusionPipeline.from_pretrained(directory, trust_remote_code=True)` loads it.

    Args:
        model: Any model of pixels, or one whose autoencoder is at hand: it is written too.
        directory: New or empty.
    """
    from remixdit.interchange import remix_dit_pipeline

    require_embedding(model.config, "dit")
    autoencoder = load_autoencoder(model.config.autoencoder)
    if not isinstance(autoencoder, LatentAutoencoder) and model.config.network.in_channels not in (
        1,
        3,
    ):
        raise ValueError(
            f"autoencoder must be known for a model of {model.config.network.in_channels} "
            "channels, got none: import it again with --autoencoder"
        )
    source = Path(remix_dit_pipeline.__file__)
    # diffusers copies the files of all directories into one folder: another version of this file
    # must have another name there.
    module = f"{source.stem}_{file_digest(source)[:12]}"
    transformer = remix_dit_pipeline.RemixDiTModel(**model_arguments(model)).eval()
    transformer.load_state_dict(model_state(model))
    with new_directory(Path(directory)) as beside:
        transformer.save_pretrained(beside / "transformer")
        scheduler_for(model.config).save_pretrained(beside / "scheduler")
        if isinstance(autoencoder, LatentAutoencoder):
            cast(Any, autoencoder.network).save_pretrained(beside / "vae")
        for folder in (beside, beside / "transformer"):  # diffusers looks for it in both
            shutil.copyfile(source, folder / f"{module}.py")
        for weights in beside.rglob("*.safetensors"):  # written for their owner alone
            shutil.copymode(beside / f"{module}.py", weights)
        index = pipeline_index(model.config, module, isinstance(autoencoder, LatentAutoencoder))
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        (beside / "model_index.json").write_text(text, "utf-8")
        (beside / "README.md").write_text(pipeline_card(model.config, module), "utf-8")


def model_arguments(model: RemixDiT) -> dict[str, Any]:
    """Return the arguments of the pipeline's network."""
    network = asdict(model.config.network)
    del network["timestep_embedding"]  # the pipeline's network has that of a DiT alone
    tables = model.experts.coefficients()
    mixed = {}
    for layer, names in model.experts.mixed.items():
        for name in ("weight",) if model.config.rank else names:
            table = model.network.get_submodule(layer).table
            mixed[f"{layer}.{name}"] = int(table)  # type: ignore[arg-type]
    return {
        "sample_size": network.pop("input_size"),
        **network,
        "boundaries": list(model.intervals.boundaries),
        "mixed": mixed,
        "table_shape": list(tables.shape),
        "rank": model.config.rank,
        "prediction_type": model.config.prediction_type,
        "num_train_timesteps": model.config.num_train_timesteps,
    }


def model_state(model: RemixDiT) -> dict[str, Tensor]:
    """Return the weights under the names that the pipeline's network has."""
    state = {"coefficients": model.experts.coefficients().detach().float()}
    layers = model.experts.mixed if model.config.rank else {}
    for name, values in model.weights().items():
        kind, _, own = name.partition(".")
        layer, _, leaf = own.rpartition(".")
        if layer in layers and leaf in ("weight", "down", "up"):
            state[f"{layer}.weight_{'shared' if leaf == 'weight' else leaf}"] = values
        elif kind == "bases":
            state[f"{own}_bases"] = values
        elif kind == "shared":
            state[own] = values
    return {name: values.detach().cpu().contiguous() for name, values in state.items()}


def scheduler_for(config: RemixConfig) -> Any:
    """Return the deterministic scheduler of the model's process; others load from its settings."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if config.is_flow:
        return FlowMatchEulerDiscreteScheduler()
    scale = 1000 / config.num_train_timesteps
    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=scale * 1e-4,
        beta_end=scale * 0.02,
        prediction_type=config.prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",
    )


def pipeline_index(config: RemixConfig, module: str, has_autoencoder: bool) -> dict[str, Any]:
    """Return the contents of `model_index.json`."""
    from diffusers import __version__

    scheduler = "FlowMatchEulerDiscreteScheduler" if config.is_flow else "DDIMScheduler"
    return {
        "_class_name": [module, "RemixDiTPipeline"],
        "_diffusers_version": __version__,
        "transformer": [module, "RemixDiTModel"],
        "scheduler": ["diffusers", scheduler],
        "vae": ["diffusers", "AutoencoderKL"] if has_autoencoder else [None, None],
        "id2label": {str(label): name for label, name in enumerate(shown_names(config))},
    }


def pipeline_card(config: RemixConfig, module: str) -> str:
    """Return the README.md of a pipeline's directory."""
    labels = "class_labels=[0, 1], " if config.network.num_classes else "batch_size=2, "
    return (
        f"---\nlibrary_name: diffusers\n{license_lines(config.license)}---\n\n"
        f"# Remix-DiT, {config.num_bases} bases, {config.num_experts} experts\n\n"
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        'pipe = DiffusionPipeline.from_pretrained("this directory", trust_remote_code=True)\n'
        f"images = pipe({labels}num_inference_steps=50).images\n```\n\n"
        f"The code that is trusted is `{module}.py`, which needs torch and diffusers alone. "
        "Each timestep is denoised by its own expert.\n"
    )
