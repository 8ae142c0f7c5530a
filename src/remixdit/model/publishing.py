"""The files of a model on the hub, from a run, a checkpoint, a model or an export."""

import logging
from collections.abc import Mapping
from pathlib import Path

from remixdit.model.card import PLACEHOLDER, card_files, model_card
from remixdit.model.config import read_config
from remixdit.model.describe import coefficients_in
from remixdit.model.hub import Upload
from remixdit.model.loading import DIFFUSERS, Found, damage_named
from remixdit.model.state import STATE_FILE, check_whole

__all__ = ["files_to_upload"]

logger = logging.getLogger(__name__)

# Of what `export` writes for diffusers; whatever else lies in the directory stays here.
EXPORTED = (".json", ".safetensors", ".md", ".py")


def files_to_upload(found: Found, name: str, training: Mapping[str, str]) -> dict[str, Upload]:
    """Return the files of a model that gets a name on the hub, by their path there.

    Args:
        found: Place of the weights.
        name: Name of the model, "owner/name".
        training: What is known of its training, label => value, for its card.

    Raises:
        ValueError: A file is missing or damaged.
    """
    directory = found.directory
    if found.weights == DIFFUSERS:
        return exported(directory, name)
    with damage_named(directory):
        config = read_config(directory)
        if (directory / STATE_FILE).is_file():
            check_whole(directory, ("config.json", found.weights))
        coefficients = coefficients_in(directory / found.weights, config)
    autoencoder = str(config.autoencoder["name"])
    if Path(autoencoder).is_absolute():
        logger.warning(
            "%s, the autoencoder, stays on this machine; `export --format pipeline` writes it too",
            autoencoder,
        )
    files: dict[str, Upload] = {
        "config.json": directory / "config.json",
        "model.safetensors": directory / found.weights,
    }
    card = directory / "README.md"
    if card.is_file() and card.read_text("utf-8") != model_card(config):
        return {**files, **named(card, name)}  # somebody's own
    return {**files, **card_files(config, coefficients, name, training)}


def exported(directory: Path, name: str) -> dict[str, Upload]:
    """Return the files of a directory of diffusers."""
    paths = [path for path in sorted(directory.rglob("*")) if path.suffix in EXPORTED]
    files: dict[str, Upload] = {
        path.relative_to(directory).as_posix(): path for path in paths if path.is_file()
    }
    card = directory / "README.md"
    return {**files, **named(card, name)} if card.is_file() else files


def named(card: Path, name: str) -> dict[str, Upload]:
    """Return a card in which the model has its name on the hub."""
    text = card.read_text("utf-8").replace(f'"{PLACEHOLDER}"', f'"{name}"')
    return {"README.md": text.encode()}
