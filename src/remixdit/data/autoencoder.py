"""Pixels <=> latents.

    encode: pixels (B, C, S, S) in [-1, 1] => moments; decode: latents => images (B, S, S, C) uint8

Two kinds: `Pixels`, where the latents are the pixels themselves, and `LatentAutoencoder`, any
diffusers AutoencoderKL. Its moments are the mean and the log-variance of a normal posterior,
stacked; a network sees

    latents = (mean + exp(logvar / 2) * noise - shift) * scale

with the scale and shift of the autoencoder's own configuration.

Shapes: B batch, C channels of a latent (of an image for `Pixels`), h = S / downsampling.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from remixdit.images.hub import downloaded, is_hub_name

__all__ = [
    "Autoencoder",
    "LatentAutoencoder",
    "Pixels",
    "load_autoencoder",
    "scale_and_shift",
    "stored_name",
    "weights_digest",
]

logger = logging.getLogger(__name__)

Spec = Mapping[str, Any]

CONFIG = "config.json"
WEIGHTS = tuple(f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin"))


class Pixels:
    """No autoencoder: latents are pixels in [-1, 1]."""

    spec: ClassVar[Spec] = {"name": "none"}

    def latent_shape(self, image_size: int, channels: int) -> tuple[int, int, int]:
        """Return (C, H, W) of what a network sees."""
        return channels, image_size, image_size

    def encode(self, pixels: Tensor) -> Tensor:
        """Return pixels as they are: (B, C, S, S) in [-1, 1]."""
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        """Return (B, C, S, S) around [-1, 1] as (B, S, S, C) uint8 images."""
        return _to_uint8(latents)


class LatentAutoencoder:
    """A diffusers AutoencoderKL that says which one it is."""

    def __init__(self, network: nn.Module, name: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.config: Mapping[str, Any] = cast(Any, network).config
        self.downsampling = 2 ** (len(self.config["block_out_channels"]) - 1)
        self.spec: Spec = {
            "name": name,
            "digest": weights_digest(network),
            "scaling_factor": float(self.config["scaling_factor"]),
            "shift_factor": float(self.config.get("shift_factor") or 0.0),
            **_channel_statistics(self.config),
        }

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights, in which encoding and decoding run."""
        return next(self.network.parameters()).dtype

    def to(
        self, device: torch.device | str, dtype: torch.dtype | None = None
    ) -> "LatentAutoencoder":
        """Move the network, in place."""
        self.network.to(device=device, dtype=dtype)
        return self

    def latent_shape(self, image_size: int, channels: int) -> tuple[int, int, int]:
        """Return (C, h, w) of what a network sees, and check that images fit."""
        if image_size % self.downsampling:
            raise ValueError(
                f"image_size must be a multiple of {self.downsampling} for {self.spec['name']}, "
                f"got {image_size}"
            )
        if channels != self.config["in_channels"]:
            raise ValueError(
                f"channels must be {self.config['in_channels']} for {self.spec['name']}, "
                f"got {channels}"
            )
        side = image_size // self.downsampling
        return int(self.config["latent_channels"]), side, side

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return the posterior of pixels in [-1, 1] as (B, 2 C, h, w): mean, then log-variance."""
        pixels = pixels.to(self.device, self.dtype)
        posterior = cast(Any, self.network).encode(pixels).latent_dist
        return cast(Tensor, posterior.parameters).float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Return scaled latents (B, C, h, w) as (B, S, S, C) uint8 images."""
        scale, shift = scale_and_shift(self.spec)
        unscaled = latents.float() / scale.to(latents.device) + shift.to(latents.device)
        decoded = cast(Any, self.network).decode(unscaled.to(self.device, self.dtype)).sample
        return _to_uint8(decoded)


Autoencoder = Pixels | LatentAutoencoder


def load_autoencoder(
    spec: str | Path | Spec | None, device: torch.device | str = "cpu", offline: bool = False
) -> Autoencoder:
    """Load an autoencoder.

    Args:
        spec: "none" or None for pixels; an id on the Hugging Face hub; a local directory that
            diffusers' `save_pretrained` wrote (or a pipeline's, with a folder `vae`); or the
            `spec` of an autoencoder, whose weights and scaling must then be the same.
        device: Device of its weights.
        offline: Whether to leave the hub alone, so that only what was downloaded is found.

    Raises:
        ValueError: It cannot be loaded, or is another one than the spec describes.
        ConnectionError: It is to be downloaded, and the hub cannot be reached.
    """
    if spec is None or spec == "none" or (isinstance(spec, Mapping) and spec["name"] == "none"):
        return Pixels()
    if not isinstance(spec, Mapping):
        return _from_pretrained(str(spec), offline).to(device)
    autoencoder = _from_pretrained(spec["name"], offline)
    for key, found in autoencoder.spec.items():
        if key != "name" and spec.get(key, found) != found:  # the digest tells more than a path
            raise ValueError(
                f"{key} of autoencoder {spec['name']} must be {spec[key]}, as its latents were "
                f"made with, got {found}"
            )
    return autoencoder.to(device)


def stored_name(name: str) -> str:
    """Return the name under which an autoencoder is kept: of a directory the resolved path."""
    return str(Path(name).resolve()) if name != "none" and Path(name).is_dir() else name


def scale_and_shift(spec: Spec) -> tuple[Tensor, Tensor]:
    """Return (scale, shift) of `latents = (unscaled - shift) * scale`, each (1 or C, 1, 1)."""
    scale = torch.tensor([spec.get("scaling_factor", 1.0)], dtype=torch.float32)
    shift = torch.tensor([spec.get("shift_factor", 0.0)], dtype=torch.float32)
    if "latents_std" in spec:  # SDXL's later relatives: statistics of each channel
        scale = scale / torch.tensor(spec["latents_std"], dtype=torch.float32)
        shift = torch.tensor(spec["latents_mean"], dtype=torch.float32)
    return scale.view(-1, 1, 1), shift.view(-1, 1, 1)


def _from_pretrained(name: str, offline: bool) -> LatentAutoencoder:
    from diffusers import AutoencoderKL

    directory = Path(name) if Path(name).is_dir() else _from_hub(name, offline)
    subfolder = "vae" if (directory / "vae").is_dir() else None
    _quiet_diffusers()
    try:
        network = AutoencoderKL.from_pretrained(
            str(directory),
            subfolder=subfolder,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        first_line = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"autoencoder {name} cannot be loaded: {first_line}") from error
    return LatentAutoencoder(network, stored_name(name))


def _from_hub(name: str, offline: bool) -> Path:
    """Return where an autoencoder of the hub was downloaded to, before or, unless offline, now."""
    if not is_hub_name(name):
        raise ValueError(
            f"autoencoder must be none, a directory, or owner/name on the hub, got {name}"
        )
    for is_cached in (True,) if offline else (True, False):
        if not is_cached:  # the name may be that of a model's file, and not the user's
            logger.warning("looking for the autoencoder %s on the Hugging Face hub", name)
        for weights in WEIGHTS:
            files = [f"{folder}{file}" for folder in ("", "vae/") for file in (CONFIG, weights)]
            directory = downloaded(name, files, is_cached=is_cached)
            if directory and any((directory / file).is_file() for file in files[1::2]):
                return directory
    if offline:
        raise ValueError(f"autoencoder must be on this machine, got {name} of the hub")
    raise ValueError(f"autoencoder must be one of diffusers, with {WEIGHTS[0]}, got {name}")


def _quiet_diffusers() -> None:
    # It logs that accelerate is missing, which is a choice, not an event.
    logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.ERROR)


def _channel_statistics(config: Mapping[str, Any]) -> dict[str, list[float]]:
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return {}
    return {"latents_mean": [float(v) for v in mean], "latents_std": [float(v) for v in std]}


def weights_digest(network: nn.Module) -> str:
    """Return a sha256 over names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        values: np.ndarray = tensor.detach().cpu().float().contiguous().numpy()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _to_uint8(images: Tensor) -> Tensor:
    """(B, C, H, W) around [-1, 1] => (B, H, W, C) uint8, rounded and clipped."""
    scaled = (images.float() + 1) * 127.5
    return scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
