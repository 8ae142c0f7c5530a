"""A directory, or a model of the hub, that diffusers saved becomes a `RemixDiT`."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from remixdit.data.autoencoder import stored_name
from remixdit.images.hub import is_hub_name
from remixdit.model.diffusers_dit import is_diffusers
from remixdit.model.loading import load_model
from remixdit.model.model import RemixDiT

if TYPE_CHECKING:
    from remixdit.interchange.importing import ImportOptions

__all__ = ["as_asked", "names_directory", "open_directory"]

logger = logging.getLogger(__name__)

REMARK = (
    "timesteps are embedded at the frequencies of diffusers' class, so outputs equal "
    "diffusers'; weights that the published code of DiT trained, such as those of "
    "facebook/DiT-XL-2-256, fit --timestep-embedding dit"
)


def names_directory(source: Path) -> bool:
    """Whether a source is a directory, or may be owner/name on the hub, rather than a file."""
    return source.is_dir() or (not source.exists() and is_hub_name(source))


def open_directory(source: Path) -> RemixDiT:
    """Return the plain DiT in a directory, or under owner/name on the hub."""
    if source.is_dir() and not is_diffusers(source):
        raise ValueError(f"checkpoint must be a file or a directory of diffusers, got {source}")
    model = load_model(source)
    if model.num_experts > 1:
        raise ValueError(f"checkpoint must be a plain DiT, got {model.num_experts} experts")
    return model


def as_asked(given: RemixDiT, options: "ImportOptions", license: str) -> RemixDiT:
    """Return a plain DiT with what the user says of it, remixed on request.

    Args:
        given: The model as its directory describes it.
        options: What the user says.
        license: Licence of the weights.
    """
    network = given.expert(0)
    for name in ("num_heads", "input_size"):
        asked, stated = getattr(options, name), getattr(network.config, name)
        if asked not in (None, stated):
            raise ValueError(f"{name} must be that of the directory, {stated}, got {asked}")
    kind = options.timestep_embedding or network.config.timestep_embedding
    if kind == "sit":
        raise ValueError("timestep_embedding must be dit or diffusers for a directory, got sit")
    if kind == "diffusers" and options.timestep_embedding is None:
        logger.warning(REMARK)
    network.config = replace(network.config, timestep_embedding=kind)
    network.t_embedder.kind = kind
    stated_autoencoder = given.config.autoencoder
    config = replace(
        given.config,
        network=network.config,
        num_bases=options.num_bases or 1,
        num_experts=options.num_experts or 1,
        boundaries=None,
        class_names=options.class_names or given.config.class_names,
        autoencoder=stated_autoencoder
        if options.autoencoder == "none"
        else {"name": stored_name(options.autoencoder)},
        license=license,
    )
    return RemixDiT(config, network).eval()
