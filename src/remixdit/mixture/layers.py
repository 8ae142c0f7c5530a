"""A layer that holds K bases of its parameters instead of one.

A linear runs all experts of a batch in one grouped product. Any other layer (convolution,
embedding, norm, attention of torch) runs expert by expert, on parameters mixed for it.

Shapes: K bases, M experts of a batch of B images, * = the shape of one parameter of the layer.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from remixdit.mixture.experts import Experts
from remixdit.mixture.product import MixedProduct, mix
from remixdit.mixture.routing import Batch

__all__ = ["MixedLayer"]


class MixedLayer(nn.Module):
    """A layer that stands in the place of another and is mixed for each expert of the batch.

    Its parameters keep their names; mixed ones are (K, *). Other attributes, such as
    `in_features`, are those of the original layer.

    Args:
        layer: Original layer, which is kept without weights of its own.
        bases: Mixed parameters (K, *) of the layer, by name; all others stay shared.
        experts: Experts that know the current batch.
        table: Index of this layer's coefficient table, in [0, L).
    """

    def __init__(
        self, layer: nn.Module, bases: dict[str, nn.Parameter], experts: Experts, table: int
    ) -> None:
        super().__init__()
        for name, parameter in layer.named_parameters():
            owner, leaf = owner_of(self, name)
            owner.register_parameter(leaf, bases.get(name, parameter))
        for name, buffer in layer.named_buffers():
            is_saved = name not in layer._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=is_saved)
        # Neither may be a child: parameters would be listed twice.
        self.__dict__["template"] = emptied(layer)
        self.__dict__["experts"] = experts
        self.table = table
        self.mixed = tuple(bases)
        self.is_linear = is_plain_linear(layer) and "weight" in bases

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the original layer that this one lacks."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "template" not in self.__dict__:  # while it is made, or unpickled
                raise
            return getattr(self.__dict__["template"], name)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Run each image through the layer of its expert."""
        if self.experts.is_mixing:
            batch = self.experts.current()
            if self.is_linear:
                return self.linear(batch, inputs[0])
            return self.by_expert(batch, inputs, options)
        if self.is_linear:  # faster than a functional call
            only = self.only()
            return F.linear(inputs[0], only["weight"], only.get("bias"))
        return functional_call(self.template, self.only(), inputs, options)

    def linear(self, batch: Batch, inputs: Tensor) -> Tensor:
        """(q B, ..., I) => (q B, ..., O), all experts in one product."""
        kind, bias = inputs.device.type, getattr(self, "bias", None)
        if torch.is_autocast_enabled(kind):
            inputs = inputs.to(torch.get_autocast_dtype(kind))
        images = inputs.reshape(batch.images(inputs), -1, inputs.shape[-1])  # (B, q ..., I)
        if batch.order is not None:
            images = images[batch.order]
        mixed_bias = bias if "bias" in self.mixed else None
        coefficients = batch.rows(self.table)
        # Autocast would round the coefficients, and so scale whole matrices.
        with torch.autocast(kind, enabled=False):
            outputs = MixedProduct.apply(  # type: ignore[no-untyped-call]
                images, self.weight, mixed_bias, coefficients, batch.spans
            )
        if bias is not None and mixed_bias is None:
            outputs = outputs + bias.to(outputs.dtype)
        if batch.inverse is not None:
            outputs = outputs[batch.inverse]
        return outputs.view(*inputs.shape[:-1], outputs.shape[-1])

    def by_expert(self, batch: Batch, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Run the original layer once for each expert, on its images."""
        count = batch.images(inputs[0])
        inputs = tuple(part(value, count, batch.order) for value in inputs)
        options = {name: part(value, count, batch.order) for name, value in options.items()}
        outputs = []
        for row, images in zip(batch.rows(self.table), batch.slices(), strict=True):
            own = tuple(cut(value, count, images) for value in inputs)
            more = {name: cut(value, count, images) for name, value in options.items()}
            weights = {name: self.mixed_weight(name, row) for name in self.mixed}
            with self.mixed_again(weights, row):
                outputs.append(functional_call(self.template, self.state(weights), own, more))
        return regrouped(outputs, count, batch.inverse)

    def mixed_weight(self, name: str, row: Tensor) -> Tensor:
        """Return a parameter (*) of the expert whose coefficients are `row`, (K,)."""
        bases = self.get_parameter(name)
        with torch.autocast(bases.device.type, enabled=False):  # as in `linear`
            return mix(bases, row[None], bases.dtype)[0]

    def state(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state of the original layer with the given mixed parameters."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers()), **weights}

    def only(self) -> dict[str, Tensor]:
        """Return the state of the only expert: the one basis, without a copy."""
        return self.state({name: self.get_parameter(name).squeeze(0) for name in self.mixed})

    def mixed_again(
        self, weights: dict[str, Tensor], row: Tensor
    ) -> AbstractContextManager[object]:
        """Save how to mix parameters again in the backward pass, instead of the parameters."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return nullcontext()
        names = {w.untyped_storage().data_ptr(): name for name, w in weights.items()}

        def pack(saved: Tensor) -> Tensor | tuple[Any, ...]:
            name = names.get(saved.untyped_storage().data_ptr())
            if name is None:
                return saved
            return name, saved.shape, saved.stride(), saved.storage_offset()

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            with torch.no_grad():
                name, *layout = kept
                return self.mixed_weight(name, row).as_strided(*layout)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def plain(self, rows: Tensor, memo: dict[int, nn.Parameter]) -> nn.Module:
        """Return the original layer with the parameters of one expert.

        Args:
            rows: (L, K) coefficients of the expert.
            memo: Plain parameters by the id of their bases, which keeps tied ones tied.
        """
        layer = emptied(self.template)
        for name, parameter in self.named_parameters():
            if id(parameter) not in memo:
                value = parameter.detach().clone()
                if name in self.mixed:
                    value = mix(parameter.detach(), rows[self.table][None], parameter.dtype)[0]
                memo[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
            owner, leaf = owner_of(layer, name)
            owner.register_parameter(leaf, memo[id(parameter)])
        for name, buffer in self.named_buffers():
            setattr(layer, name, buffer.clone())
        return layer

    def train(self, mode: bool = True) -> "MixedLayer":
        """Set the mode, also that of the original layer."""
        self.template.train(mode)
        return super().train(mode)


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a parameter, made if missing, and its name there."""
    *path, leaf = name.split(".")
    for child in path:
        if child not in module._modules:
            module.add_module(child, nn.Module())
        module = module.get_submodule(child)
    return module, leaf


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer multiplies by its weight and adds its bias, and does nothing else."""
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward


def emptied(layer: nn.Module) -> nn.Module:
    """Return a copy of a layer whose parameters and buffers take no memory."""
    memo: dict[int, Any] = {id(b): b.to("meta") for b in layer.buffers()}
    for parameter in layer.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return copy.deepcopy(layer, memo)


def is_of_images(value: Any, count: int) -> bool:
    """Whether an argument is a tensor whose rows divide evenly among B images."""
    return (
        isinstance(value, Tensor) and value.ndim > 0 and len(value) > 0 and not len(value) % count
    )


def part(value: Any, count: int, order: Tensor | None) -> Any:
    """Return an argument with its images in `order`."""
    if order is None or not is_of_images(value, count):
        return value
    return value.view(count, -1, *value.shape[1:])[order].flatten(0, 1)


def cut(value: Any, count: int, images: slice) -> Any:
    """Return the rows of some images of an argument."""
    if not is_of_images(value, count):
        return value
    rows = len(value) // count
    return value[images.start * rows : images.stop * rows]


def regrouped(outputs: list[Any], count: int, inverse: Tensor | None) -> Any:
    """Return the outputs of all experts as one, in the order in which the images were given."""
    if isinstance(outputs[0], Tensor):
        return part(torch.cat(outputs), count, inverse)
    if isinstance(outputs[0], tuple):
        columns = zip(*outputs, strict=True)
        return tuple(regrouped(list(column), count, inverse) for column in columns)
    return outputs[0]
