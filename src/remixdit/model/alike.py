"""Several networks that are to become one model: what they state is compared."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from remixdit.diffusion.dit import DiT
from remixdit.model.config import RemixConfig
from remixdit.model.match import match, refuse_other, side_of

if TYPE_CHECKING:
    from remixdit.model.model import RemixDiT

__all__ = ["boundaries_at", "plain_networks", "refuse_other_model"]

# What a model states beside the shape of its network.
STATED = ("prediction_type", "num_train_timesteps", "class_names", "autoencoder")


def plain_networks(
    given: "Sequence[DiT | RemixDiT]",
) -> tuple[list[DiT], dict[str, Any]]:
    """Return several plain networks of one shape, and the fields of `RemixConfig` that they state.

    Args:
        given: Networks, or models of one expert, which state more than a shape.
    """
    if not given:
        raise ValueError("networks must hold at least one expert, got none")
    shapes = [one.config if isinstance(one, DiT) else one.config.network for one in given]
    for number, shape in enumerate(shapes):
        for name, own in asdict(shapes[0]).items():
            refuse_other(name, own, getattr(shape, name), "networks[0]", f"networks[{number}]")
    models = {n: one for n, one in enumerate(given) if not isinstance(one, DiT)}
    first = min(models, default=0)
    for number, model in models.items():
        names = f"networks[{first}]", f"networks[{number}]"
        refuse_other_model(models[first].config, model.config, *names)
    settings = models[first].config if models else None
    stated = {name: getattr(settings, name) for name in (*STATED, "license")} if settings else {}
    return [one if isinstance(one, DiT) else one.expert(0) for one in given], stated


def refuse_other_model(own: RemixConfig, other: RemixConfig, name: str, other_name: str) -> None:
    """Refuse a second plain model that cannot become one with the first.

    Args:
        own: Configuration of the first model.
        other: Configuration of the second.
        name: Name of the first in errors.
        other_name: Name of the second.
    """
    if other.num_experts > 1:
        raise ValueError(
            f"num_experts of {other_name} must be 1, a plain DiT, got {other.num_experts}"
        )
    shape = asdict(other.network)
    for field, wanted in asdict(own.network).items():
        refuse_other(field, wanted, shape[field], name, other_name)
    labels = match(side_of(name, own), side_of(other_name, other))
    if list(labels) != sorted(labels):
        raise ValueError(
            f"class_names of {other_name} must be in the order of {name}, {own.class_names}, "
            f"got {other.class_names}"
        )


def boundaries_at(
    ratio: float, count: int, options: Mapping[str, Any]
) -> tuple[int, ...] | tuple[float, ...]:
    """Return the boundaries of two experts, the noisier of which owns timesteps >= ratio * T.

    Args:
        ratio: Boundary as a share of the timesteps, in (0, 1), as diffusers states it for Wan2.2.
        count: Number of experts, which must be 2.
        options: Fields of `RemixConfig`.
    """
    if count != 2:
        raise ValueError(f"boundary_ratio must be given for 2 networks, got {count}")
    if not 0 < ratio < 1:
        raise ValueError(f"boundary_ratio must be between 0 and 1, got {ratio}")
    if options.get("prediction_type") == "flow_prediction":
        return (0.0, ratio, 1.0)
    total = options.get("num_train_timesteps", 1000)
    return (0, math.ceil(round(ratio * total, 6)), total)  # rounded: 0.7 * 10 is above 7
