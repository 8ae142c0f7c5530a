"""Published checkpoints of DiT and Remix-DiT become a `RemixDiT`."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from remixdit.data.autoencoder import stored_name
from remixdit.files import new_directory, refuse_occupied
from remixdit.interchange.directories import as_asked, names_directory, open_directory
from remixdit.interchange.files import read_tensors
from remixdit.interchange.layout import (
    LOGITS,
    check_shapes,
    infer_config,
    load_network,
    mixed_in,
    without_prefix,
)
from remixdit.interchange.sit import as_flow, kind_of, refuse_other_path
from remixdit.model.config import LARGEST, RemixConfig
from remixdit.model.model import RemixDiT

__all__ = ["ImportConfig", "ImportOptions", "import_checkpoint", "run_import"]

logger = logging.getLogger(__name__)

PUBLISHED_LICENSE = "cc-by-nc-4.0"  # of the released weights of DiT and of Remix-DiT


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Facts about a model that its file may not contain."""

    num_heads: int | None = None
    """Number of attention heads; required for widths other than those of S, B, L and XL."""
    input_size: int | None = None
    """Height and width of the latents; required if the file has no pos_embed."""
    num_bases: int | None = None
    """Number of bases (K) to remix a plain DiT into. By default it stays plain (K = N = 1)."""
    num_experts: int | None = None
    """Number of experts (N) to remix a plain DiT into; required with num_bases."""
    class_names: tuple[str, ...] = ()
    """Names of the classes, in the order of their labels."""
    autoencoder: str = "none"
    """Autoencoder of the latents: none, an id on the Hugging Face Hub, or a directory."""
    timestep_embedding: str | None = None
    """Embedding of timesteps: dit, diffusers or sit (the file is a SiT); by default as found."""
    license: str | None = None
    """Licence of the weights. By default cc-by-nc-4.0, as released, with a warning."""
    ema: bool = True
    """Use the averaged (EMA) weights of a training checkpoint rather than its last ones."""

    def __post_init__(self) -> None:
        """Refuse half of a mixture."""
        if (self.num_bases is None) != (self.num_experts is None):
            raise ValueError(
                "num_bases and num_experts must be given together, got "
                f"{self.num_bases} and {self.num_experts}"
            )
        if self.license is not None and not self.license.strip():
            raise ValueError(f"license must name a licence, got {self.license!r}")


@dataclass(frozen=True, kw_only=True)
class ImportConfig(ImportOptions):
    """A checkpoint to import."""

    source: Path
    """A .pt or .safetensors file with the published names, or a directory of diffusers."""
    output: Path
    """Directory for the model; must be new or empty."""


def run_import(config: ImportConfig) -> RemixDiT:
    """Import a checkpoint and write the model directory, whole or not at all."""
    refuse_occupied(config.output)
    model = model_from_file(config.source, config)
    with new_directory(config.output) as directory:
        model.save_pretrained(directory)
    return model


def import_checkpoint(path: str | Path, **options: Any) -> RemixDiT:
    """Return the model of a published checkpoint of DiT or Remix-DiT.

    The configuration follows from the shapes. float16 and bfloat16 weights become float32.
    Nothing in the file is run. The licence of the weights is kept in the configuration; it
    defaults to that of the released weights, because nobody may be there to be asked, and the
    stricter guess harms least.

    Args:
        path: A file of `torch.save` (a state dict, alone or under `ema` or `model`) or
            `.safetensors`; a `DiTTransformer2DModel` or a `DiTPipeline` that diffusers saved, or
            one on the hub.
        options: Fields of `ImportOptions`.

    Raises:
        ValueError: The file is not such a checkpoint, or an option is missing or contradicts it.
    """
    return model_from_file(Path(path), ImportOptions(**options))


def model_from_file(path: Path, options: ImportOptions) -> RemixDiT:
    """Return the model of a published checkpoint, or of a directory that diffusers saved."""
    if names_directory(path):
        given = open_directory(path)
        stated = {"license": given.config.license}
        return as_asked(given, options, weights_license(options, stated, path))
    state, metadata = read_tensors(path, options.ema)
    state = without_prefix(state)
    kind = options.timestep_embedding or embedding_in(path, state, metadata)
    prediction_type = metadata.get("prediction_type", "epsilon")
    if kind == "sit":
        refuse_other_path(metadata)
        state, prediction_type = as_flow(state), "flow_prediction"
    num_heads = options.num_heads
    if num_heads is None:
        num_heads = stated_number(metadata, "num_heads")  # of one of our own exports
    network = infer_config(state, num_heads, options.input_size)
    check_shapes(state, network)
    network = replace(network, timestep_embedding=kind)
    num_bases, num_experts = mixture_counts(state, options)
    refuse_not_finite(path, state)
    config = RemixConfig(
        network=network,
        num_bases=num_bases,
        num_experts=num_experts,
        prediction_type=prediction_type,
        num_train_timesteps=stated_timesteps(metadata),
        class_names=options.class_names or stated_names(metadata),
        autoencoder=weights_autoencoder(options, metadata),
        license=weights_license(options, metadata, path),
    )
    weights = {name: v.float() for name, v in state.items() if name != "pos_embed"}
    if LOGITS in weights:
        return import_mixture(weights, config)
    return RemixDiT(config, load_network(weights, network)).eval()


def embedding_in(path: Path, state: Mapping[str, Tensor], stated: Mapping[str, str]) -> str:
    """Return the embedding of timesteps in a file: that of a SiT, if it is one, else a DiT's."""
    if "boundaries" in stated:  # one of our own exports
        return "dit"
    return kind_of(path.name, state, stated)


def refuse_not_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse weights that no command would use."""
    for name, values in state.items():
        if values.is_floating_point() and not values.isfinite().all():
            raise ValueError(f"{name} of {path} must be finite, got nan or inf")


def stated_timesteps(stated: Mapping[str, str]) -> int:
    """Return T, which the metadata of a file may state."""
    found = stated_number(stated, "num_train_timesteps") or 1000
    most = LARGEST["num_train_timesteps"]
    if found > most:
        raise ValueError(
            f"num_train_timesteps in the file's metadata must be at most {most}, got {found}"
        )
    return found


def stated_names(stated: Mapping[str, str]) -> tuple[str, ...]:
    """Return the class names that the metadata of a file may state."""
    names = stated_json(stated, "class_names", [])
    if not all(isinstance(name, str) for name in names):
        raise ValueError("class_names in the file's metadata must be texts, got other values")
    return tuple(names)


def stated_number(stated: Mapping[str, str], name: str) -> int | None:
    """Return a number in the metadata of a file, None if there is none."""
    text = stated.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() else None


def stated_json(stated: Mapping[str, str], name: str, default: Any) -> Any:
    """Return JSON values in the metadata of a file, of the type of the default."""
    try:
        found = json.loads(stated.get(name, "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} in the file's metadata must be JSON, got {error}") from error
    return found if isinstance(found, type(default)) else default


def weights_autoencoder(options: ImportOptions, stated: Mapping[str, str]) -> Mapping[str, Any]:
    """Return the autoencoder of the latents: as given, else as the file says."""
    if options.autoencoder != "none":
        return {"name": stored_name(options.autoencoder)}
    found = stated_json(stated, "autoencoder", {})
    return found if isinstance(found.get("name"), str) else {"name": "none"}


def mixture_counts(state: Mapping[str, Tensor], options: ImportOptions) -> tuple[int, int]:
    """Return K and N: those of a Remix-DiT, those asked for of a plain DiT."""
    if LOGITS not in state:
        if options.num_bases is None or options.num_experts is None:
            return 1, 1
        return options.num_bases, options.num_experts
    num_experts, num_bases = state[LOGITS].shape
    asked = (options.num_bases, options.num_experts)
    if asked not in ((None, None), (num_bases, num_experts)):
        raise ValueError(
            f"num_bases and num_experts must be those of the Remix-DiT, {num_bases} and "
            f"{num_experts}, got {asked[0]} and {asked[1]}"
        )
    return num_bases, num_experts


def import_mixture(weights: dict[str, Tensor], config: RemixConfig) -> RemixDiT:
    """Return the model of a published Remix-DiT's weights."""
    mixed = mixed_in(config.network)
    state = {"logits": weights.pop(LOGITS)}
    for name, values in weights.items():
        state[f"{'bases' if name in mixed else 'shared'}.{name}"] = values
    model = RemixDiT.empty(config)
    model.load_weights(state)
    return model.eval()


def weights_license(options: ImportOptions, metadata: Mapping[str, str], path: Path) -> str:
    """Return the licence of the weights: as given, as the file says, or as released."""
    if options.license is not None:
        return options.license
    if metadata.get("license"):
        return metadata["license"]
    logger.warning(
        "The weights of %s are taken to be under %s, as the released weights of DiT and Remix-DiT "
        "are; --license names another.",
        path,
        PUBLISHED_LICENSE,
    )
    return PUBLISHED_LICENSE
