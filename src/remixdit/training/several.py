"""A mixture whose bases are several given networks: a merge learned over timesteps.

    weights[n] = sum_k coefficients[n, k] * networks[k]

The networks come in the order of the timesteps that they are meant for, the least noisy first:
expert n prefers network floor(n K / N) at the start, and shares most with its neighbours.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from remixdit.diffusion.dit import DiT
from remixdit.mixture.coefficients import initial_table
from remixdit.model.alike import refuse_other_model
from remixdit.model.config import RemixConfig
from remixdit.model.loading import load_model
from remixdit.model.model import RemixDiT

__all__ = ["further_models", "refuse_unmixed_differences", "stacked_weights"]


def further_models(names: Sequence[str], first: RemixConfig, first_name: str) -> Iterator[RemixDiT]:
    """Yield the plain models beside the first; one that differs from it is refused.

    Args:
        names: Names of the models.
        first: Configuration of the first model.
        first_name: Its name in errors.
    """
    for name in names:
        model = load_model(name)
        refuse_other_model(first, model.config, first_name, name)
        yield model


def stacked_weights(
    target: RemixConfig, networks: Sequence[DiT], symmetry: float
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a mixture of K networks by name on disk, one at a time.

    Args:
        target: Configuration of the mixture.
        networks: K networks of its shape, the least noisy first.
        symmetry: Preference of an expert for its own basis.
    """
    experts = RemixDiT.empty(target).experts
    states = [network.state_dict() for network in networks]
    for key, name in experts.disk_names().items():
        if name.startswith("bases."):
            yield name, torch.stack([state[key] for state in states])
        elif name != "logits":
            yield name, states[0][key]
    table = initial_table(target.num_bases, target.num_experts, target.coefficients, symmetry)
    yield "logits", table.expand(experts.logits.shape)


def refuse_unmixed_differences(target: RemixConfig, networks: Sequence[DiT]) -> None:
    """Refuse networks that differ in a parameter that all experts would share."""
    states = [network.state_dict() for network in networks]
    for key, name in RemixDiT.empty(target).experts.disk_names().items():
        if name.startswith("shared.") and not all(
            torch.equal(state[key], states[0][key]) for state in states
        ):
            raise ValueError(
                f"mixed must match {key}, in which the networks of --from differ (--mixed all "
                f"matches everything), got {target.mixed}"
            )
