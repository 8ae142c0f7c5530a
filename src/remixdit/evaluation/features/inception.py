"""FID's own Inception-v3: the network of the 2015-12-05 release, in plain torch.

images (B, 3, 299, 299) => (B, 192, 35, 35) => three blocks => (B, 768, 17, 17) => four blocks
=> (B, 1280, 8, 8) => two blocks => pool (B, 2048) => logits (B, 1008)

It departs from the Inception-v3 of the textbooks where the published weights need it: average
pools leave the padding out, the last block pools by maximum, there are 1008 classes, and images
are resized as TensorFlow 1 did. Parameters carry the names of the published file.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = [
    "Conv",
    "ConvNorm",
    "InceptionOutput",
    "InceptionV3",
    "Mixed",
    "load_inception",
    "resize_like_tensorflow",
]

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
# The SHA-256 of the published file.
INCEPTION_DIGEST = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

IMAGE_SIZE = 299
SPATIAL_CHANNELS = 7  # of 192, so that spatial features (7 * 17 * 17) are about as many as pool's


class Conv(NamedTuple):
    """A convolution with its normalisation and ReLU, by its name in the published file."""

    name: str
    out_channels: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: int = 1


class ConvNorm(nn.Module):
    """Convolution, normalisation, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int] = (1, 1),
        stride: int = 1,
        *,
        padded: bool = True,
    ) -> None:
        super().__init__()
        height, width = kernel_size
        padding = (height // 2, width // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=padding, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return F.relu(self.bn(self.conv(hidden)), inplace=True)


def _conv_norm(in_channels: int, conv: Conv) -> ConvNorm:
    # Within the mixed blocks, what halves the resolution is not padded and all else is.
    _, out_channels, kernel_size, stride = conv
    return ConvNorm(in_channels, out_channels, kernel_size, stride, padded=stride == 1)


# Links run one after the other; a link of two convolutions forks and ends its chain.
Chain = Sequence[tuple[Conv, ...]]


class Mixed(nn.Module):
    """Chains of convolutions and a pool, side by side, concatenated over channels."""

    def __init__(
        self,
        in_channels: int,
        chains: Sequence[Chain],
        pool: Callable[[Tensor], Tensor],
        pool_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.chains = [[[conv.name for conv in link] for link in chain] for chain in chains]
        for chain in chains:
            width = in_channels
            for link in chain:
                for conv in link:
                    self.add_module(conv.name, _conv_norm(width, conv))
                width = link[0].out_channels
        self.pool = pool
        self.branch_pool = ConvNorm(in_channels, pool_channels) if pool_channels else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        outputs = []
        for chain in self.chains:
            ends = [hidden]
            for link in chain:
                ends = [self.get_submodule(name)(ends[0]) for name in link]
            outputs += ends
        pooled = self.pool(hidden)
        outputs.append(pooled if self.branch_pool is None else self.branch_pool(pooled))
        return torch.cat(outputs, 1)


_average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halving_pool = partial(F.max_pool2d, kernel_size=3, stride=2)


def _chain(*convs: Conv) -> list[tuple[Conv, ...]]:
    return [(conv,) for conv in convs]


def _block_35(in_channels: int, pool_channels: int) -> Mixed:
    chains = [
        _chain(Conv("branch1x1", 64)),
        _chain(Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        _chain(
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3)),
        ),
    ]
    return Mixed(in_channels, chains, _average_pool, pool_channels)


def _halve_35(in_channels: int) -> Mixed:
    chains = [
        _chain(Conv("branch3x3", 384, (3, 3), 2)),
        _chain(
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3), 2),
        ),
    ]
    return Mixed(in_channels, chains, _halving_pool)


def _block_17(width: int) -> Mixed:
    chains = [
        _chain(Conv("branch1x1", 192)),
        _chain(
            Conv("branch7x7_1", width),
            Conv("branch7x7_2", width, (1, 7)),
            Conv("branch7x7_3", 192, (7, 1)),
        ),
        _chain(
            Conv("branch7x7dbl_1", width),
            Conv("branch7x7dbl_2", width, (7, 1)),
            Conv("branch7x7dbl_3", width, (1, 7)),
            Conv("branch7x7dbl_4", width, (7, 1)),
            Conv("branch7x7dbl_5", 192, (1, 7)),
        ),
    ]
    return Mixed(768, chains, _average_pool, pool_channels=192)


def _halve_17() -> Mixed:
    chains = [
        _chain(Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2)),
        _chain(
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, (1, 7)),
            Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, (3, 3), 2),
        ),
    ]
    return Mixed(768, chains, _halving_pool)


def _block_8(in_channels: int, pool: Callable[[Tensor], Tensor]) -> Mixed:
    chains = [
        _chain(Conv("branch1x1", 320)),
        [*_chain(Conv("branch3x3_1", 384)), _fork("branch3x3_2")],
        [
            *_chain(Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, (3, 3))),
            _fork("branch3x3dbl_3"),
        ],
    ]
    return Mixed(in_channels, chains, pool, pool_channels=192)


def _fork(name: str) -> tuple[Conv, ...]:
    return Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))


class InceptionOutput(NamedTuple):
    """What the metrics need of one pass."""

    pool: Tensor  # (B, 2048)
    logits: Tensor  # (B, 1008) without the bias, as every published inception score
    spatial: Tensor  # (B, 2023) = (17, 17, 7) flattened, as in precomputed statistics


class InceptionV3(nn.Module):
    """The network from resized images to features; random until weights are loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, (3, 3), 2, padded=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = ConvNorm(64, 80)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, (3, 3), padded=False)
        self.Mixed_5b = _block_35(192, pool_channels=32)
        self.Mixed_5c = _block_35(256, pool_channels=64)
        self.Mixed_5d = _block_35(288, pool_channels=64)
        self.Mixed_6a = _halve_35(288)
        self.Mixed_6b = _block_17(128)
        self.Mixed_6c = _block_17(160)
        self.Mixed_6d = _block_17(160)
        self.Mixed_6e = _block_17(192)
        self.Mixed_7a = _halve_17()
        self.Mixed_7b = _block_8(1280, _average_pool)
        # A slip of the 2015 release that its weights have been trained around.
        self.Mixed_7c = _block_8(2048, _maximum_pool)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> InceptionOutput:
        """Map images (B, 3, 299, 299) in [-1, 1] to what the metrics need."""
        hidden = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        hidden = _halving_pool(hidden)  # (B, 64, 73, 73)
        hidden = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden))
        hidden = _halving_pool(hidden)  # (B, 192, 35, 35)
        hidden = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(hidden)))  # (B, 288, 35, 35)
        hidden = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(hidden)))  # (B, 768, 17, 17)
        spatial = self.Mixed_6d.get_submodule("branch1x1")(hidden)[:, :SPATIAL_CHANNELS]
        hidden = self.Mixed_6e(self.Mixed_6d(hidden))
        hidden = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(hidden)))  # (B, 2048, 8, 8)
        pool = hidden.mean((2, 3))
        # Channels last: precomputed spatial statistics count them fastest.
        return InceptionOutput(
            pool, pool @ self.fc.weight.T, spatial.permute(0, 2, 3, 1).flatten(1)
        )


def resize_like_tensorflow(images: Tensor, size: int) -> Tensor:
    """Resize images (B, C, H, W) to (B, C, size, size) by TensorFlow 1's bilinear rule.

    Pixel i of the output looks at i * H / size: the corners are not aligned, the centres neither,
    and nothing is smoothed before shrinking. Scores depend on it, so it must be this one.
    """
    rows = _lerp(images.transpose(2, 3), size).transpose(2, 3)
    return _lerp(rows, size)


def _lerp(images: Tensor, size: int) -> Tensor:
    length = images.shape[-1]
    # float32 throughout, as there: a position off by rounding can fall on another pixel.
    scale = torch.tensor(length / size, dtype=torch.float32, device=images.device)
    positions = torch.arange(size, dtype=torch.float32, device=images.device) * scale
    lower = positions.long()
    upper = (lower + 1).clamp_max(length - 1)
    return torch.lerp(images[..., lower], images[..., upper], positions - lower)


def load_inception(path: Path) -> InceptionV3:
    """Return the network with weights from a .safetensors file or a .pth of plain tensors."""
    if path.suffix == ".safetensors":
        weights: Mapping[str, Tensor] = load_file(path)
    else:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    network = InceptionV3().eval().requires_grad_(False)
    # Counters of training batches: some files have them, inference needs none.
    counters = {name for name in network.state_dict() if name.endswith("num_batches_tracked")}
    wanted, found = network.state_dict().keys() - counters, weights.keys() - counters
    if wanted != found:
        raise ValueError(
            f"{path} must hold the {len(wanted)} tensors of FID's Inception-v3, got {len(found)}: "
            f"missing {sorted(wanted - found)[:3]}, unexpected {sorted(found - wanted)[:3]}"
        )
    network.load_state_dict({name: weights[name] for name in wanted}, strict=False)
    return network
