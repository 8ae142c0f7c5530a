"""What the tests share: the reference vectors, and tiny networks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from remixdit.dit import DiT, DiTConfig
from remixdit.mixing import Mixture

PARITY = Path(__file__).parent / "parity"


@pytest.fixture(scope="session")
def given() -> dict[str, Tensor]:
    """Inputs, weights and outputs of the published implementations."""
    return load_file(PARITY / "given.safetensors")


@pytest.fixture(scope="session")
def settings() -> dict:
    """The configuration that belongs to `given`."""
    return json.loads((PARITY / "given.json").read_text())


def tiny_config(**changes: object) -> DiTConfig:
    """A network that trains in milliseconds."""
    fields = {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 1,
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 3,
        "learn_sigma": True,
    }
    return DiTConfig(**{**fields, **changes})


def tiny_dit(seed: int = 0, **changes: object) -> DiT:
    """A tiny network in which no weight is zero, so that every gradient flows."""
    network = DiT(tiny_config(**changes), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def published_dit(given: dict[str, Tensor], settings: dict) -> DiT:
    """The DiT whose outputs are `dit.output`."""
    network = DiT(DiTConfig(**settings["config"]))
    weights = {name[12:]: value for name, value in given.items() if name.startswith("dit.weights.")}
    weights.pop("pos_embed")
    network.load_state_dict(weights)
    return network


def published_mixture(given: dict[str, Tensor], settings: dict) -> Mixture:
    """The mixture whose outputs are `remix.output`."""
    network = DiT(DiTConfig(**settings["config"]))
    mixture = Mixture(network, settings["num_bases"], settings["num_experts"])
    bases = mixture.bases()
    state = {"logits": given["remix.weights.coefficients.weight"]}
    for name in network.state_dict():
        kind = "bases" if name in bases else "shared"
        state[f"{kind}.{name}"] = given[f"remix.weights.{name}"]
    mixture.load_state_dict(state)
    return mixture


def batch(network: DiT, size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random latents, timesteps and labels for a network."""
    config = network.config
    generator = torch.Generator().manual_seed(seed)
    shape = (size, config.in_channels, config.input_size, config.input_size)
    latents = torch.randn(shape, generator=generator)
    timesteps = torch.randint(1000, (size,), generator=generator)
    class_labels = torch.randint(config.num_classes + 1, (size,), generator=generator)
    return latents, timesteps, class_labels
