"""A frozen linear to which K low-rank bases are added, mixed for each expert.

    weights[n] = weight + sum_k coefficients[n, k] up[k] @ down[k]

as TimeLoRA does (arXiv:2405.03958). Only `down`, `up` and the coefficients are trained. The sum
over k is one product of width K r, scaled image by image, so no weights are mixed at all:

    outputs = inputs @ weight^T + bias + (coefficients * (inputs @ down^T)) @ up^T

Shapes: K bases, r their rank, B images, L coefficient tables, I in, O out.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remixdit.seeds import generator_for

if TYPE_CHECKING:
    from remixdit.mixture.experts import Experts

__all__ = ["LowRankLinear", "initial_pair", "merged", "pair_of"]


class LowRankLinear(nn.Module):
    """A layer that stands in the place of a linear, whose parameters keep their names.

    Args:
        layer: Original linear, whose parameters are shared by all experts.
        pair: `down` (K, r, I) and `up` (K, O, r).
        experts: Experts that know the current batch.
        table: Index of this layer's coefficient table, in [0, L).
    """

    experts: "Experts"

    def __init__(
        self, layer: nn.Linear, pair: tuple[Tensor, Tensor], experts: "Experts", table: int
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.down, self.up = (nn.Parameter(values) for values in pair)
        self.__dict__["experts"] = experts  # not a child, as the network has it
        self.table = table

    def forward(self, inputs: Tensor) -> Tensor:
        """(q B, ..., I) => (q B, ..., O), each image through the layer of its expert."""
        outputs = F.linear(inputs, self.weight, self.bias)
        inside = F.linear(inputs, self.down.flatten(0, 1).to(inputs.dtype))  # (q B, ..., K r)
        if self.experts.is_mixing:
            inside = self.scaled(inside)
        up = self.up.transpose(0, 1).flatten(1)  # (O, K r)
        return outputs + F.linear(inside, up.to(inside.dtype))

    def scaled(self, inside: Tensor) -> Tensor:
        """Multiply (q B, ..., K r) by the coefficients of each image's expert."""
        batch = self.experts.current()
        rows = batch.rows_of_images(self.table)  # (B, K)
        images = inside.reshape(batch.images(inside), -1, *self.down.shape[:2])  # (B, *, K, r)
        # In float32: a coefficient of 8 bits would scale the whole product by a little.
        return (images * rows[:, None, :, None]).to(inside.dtype).view(inside.shape)

    def plain(self, rows: Tensor, memo: dict[int, nn.Parameter]) -> nn.Linear:
        """Return the linear of one expert, without low-rank parts.

        Args:
            rows: (L, K) coefficients of the expert.
            memo: Plain parameters by the id of the shared ones, which keeps tied ones tied.
        """
        with torch.device("meta"):
            layer = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        layer.weight = nn.Parameter(merged(self.weight, self.down, self.up, rows[self.table]))
        if self.bias is not None:
            own = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
            layer.bias = memo.setdefault(id(self.bias), own)
        return layer.train(self.training)


@torch.no_grad()
def merged(weight: Tensor, down: Tensor, up: Tensor, row: Tensor) -> Tensor:
    """Return the weight (O, I) of the expert with the coefficients `row`, (K,)."""
    lora_a, lora_b = pair_of(down, up, row)
    return (weight + lora_b @ lora_a).to(weight.dtype)


def pair_of(down: Tensor, up: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Return (K r, I) and (O, K r), whose product an expert of coefficients `row` (K,) adds."""
    return down.flatten(0, 1), (row[:, None, None] * up).transpose(0, 1).flatten(1)


def initial_pair(name: str, layer: nn.Linear, num_bases: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the `down` and `up` of a layer at the start, when all experts are the network.

    As in LoRA (arXiv:2106.09685): down is uniform, up is zero. What is drawn depends on the
    layer's name only.
    """
    shapes = (num_bases, rank, layer.in_features), (num_bases, layer.out_features, rank)
    device = layer.weight.device
    if device.type == "meta":
        return torch.empty(shapes[0], device=device), torch.empty(shapes[1], device=device)
    drawn = torch.rand(shapes[0], generator=generator_for(0, "low rank", name))
    down = (2 * drawn - 1) / math.sqrt(layer.in_features)
    wide = torch.promote_types(layer.weight.dtype, torch.float32)
    return down.to(device, wide), torch.zeros(shapes[1], device=device, dtype=wide)
