"""Tiny networks, and the models of the reference vectors."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from remixdit.diffusion.dit import DiT, DiTConfig
from remixdit.evaluation.features import Extractor, Features
from remixdit.mixture.experts import Experts
from remixdit.model.config import RemixConfig
from remixdit.model.model import RemixDiT


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


def published_remix(given: dict[str, Tensor], settings: dict) -> RemixDiT:
    """The mixture whose outputs are `remix.output`."""
    config = RemixConfig(
        network=DiTConfig(**settings["config"]),
        num_bases=settings["num_bases"],
        num_experts=settings["num_experts"],
    )
    model = RemixDiT.empty(config)
    state = {"logits": given["remix.weights.coefficients.weight"].clone()}
    for key, name in model.experts.disk_names().items():
        if name != "logits":
            state[name] = given[f"remix.weights.{key}"].clone()
    model.load_weights(state)
    return model


@torch.no_grad()
def perturb(experts: Experts, scale: float = 0.5, seed: int = 0) -> None:
    """Add noise to the bases, `scale` times the root mean square of each parameter."""
    generator = torch.Generator().manual_seed(seed)
    for bases in experts.bases().values():
        size = scale * bases.square().mean().sqrt()
        bases.add_(size * torch.randn(bases.shape, generator=generator, dtype=bases.dtype))


def batch(network: DiT, size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random latents, timesteps and labels for a network."""
    config = network.config
    generator = torch.Generator().manual_seed(seed)
    shape = (size, config.in_channels, config.input_size, config.input_size)
    latents = torch.randn(shape, generator=generator)
    timesteps = torch.randint(1000, (size,), generator=generator)
    class_labels = torch.randint(config.num_classes + 1, (size,), generator=generator)
    return latents, timesteps, class_labels


def saved_bytes(network: torch.nn.Module, inputs: tuple[Tensor, ...] | None = None) -> int:
    """Return the bytes of activations that a forward keeps for the backward pass."""
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept = {}

    def pack(values: torch.Tensor) -> torch.Tensor:
        storage = values.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, lest another take its place
        return values

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
        network(*(batch(network) if inputs is None else inputs))
    return sum(storage.nbytes() for storage in kept.values())


def tiny_model() -> RemixDiT:
    model = RemixDiT.from_dit(tiny_dit(), 2, 5)
    perturb(model.experts)
    return model


def save_tiny(directory, **config) -> AutoencoderKL:
    torch.manual_seed(0)
    settings = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "scaling_factor": 0.4,
        **config,
    }
    network = AutoencoderKL(**settings).eval()
    network.save_pretrained(directory)
    return network


def colours(pixels: Tensor) -> Features:
    """Mean and deviation of each colour, as an extractor that takes no time."""
    scaled = pixels / 255
    pool = torch.cat([scaled.mean((2, 3)), scaled.std((2, 3))], 1)
    return Features(pool, logits=8 * pool, spatial=pool[:, :4])


COLOURS = Extractor("colours", 6, "none", "0" * 64, torch.device("cpu"), colours)
