"""The data, the settings and the model with which a training run starts.

The model is new, remixed from a plain DiT, or a given mixture; the data decide its input size,
channels and classes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from remixdit.data import ShardDataset, check_apart, is_shard_dir, open_source
from remixdit.data.autoencoder import Pixels
from remixdit.diffusion.dit import DiT
from remixdit.distributed.parallel import checksum_of, fill
from remixdit.mixture.coefficients import initial_table
from remixdit.mixture.low_rank import initial_pair
from remixdit.model.config import RemixConfig
from remixdit.model.loading import (
    load_model,
    model_config,
    newest_checkpoint,
    stated_config,
    steps_done,
)
from remixdit.model.match import (
    ClassesDifferError,
    Side,
    are_numbers,
    match,
    match_autoencoders,
    side_of,
)
from remixdit.model.model import RemixDiT
from remixdit.seeds import generator_for
from remixdit.training.adapting import (
    adapted,
    carried_weights,
    refuse_other_mixture,
    refuse_other_network,
    resampling_remark,
)
from remixdit.training.config import TrainConfig
from remixdit.training.run import DATA_DIR, location, stated_settings
from remixdit.training.several import (
    further_models,
    refuse_unmixed_differences,
    stacked_weights,
)
from remixdit.training.strata import cut_intervals, distribution_of, training_strata

__all__ = [
    "Outline",
    "Start",
    "give_storage",
    "outline_of",
    "run_settings",
    "settled",
    "side_of_data",
    "starting_model",
    "stretched_schedules",
]


class Outline(NamedTuple):
    """Facts about the data that a model needs; they are known before the data are encoded."""

    shape: tuple[int, int, int]
    """(C, H, W) of a latent."""
    class_names: tuple[str, ...]
    """(num_classes,) names; none for data without labels."""
    autoencoder: Mapping[str, Any]
    """Autoencoder between latents and pixels."""


def side_of_data(data: Outline) -> Side:
    """Return what the data of a run state; the model is fitted to their shape."""
    return Side(
        name="the data",
        num_classes=len(data.class_names),
        class_names=data.class_names,
        autoencoder=data.autoencoder,
    )


def outline_of(config: TrainConfig) -> Outline:
    """Return the outline of a run's data, without writing anything."""
    shards = encoded_data(config)
    if shards is not None:
        return Outline(shards.shape, shards.class_names, shards.autoencoder)
    check_apart(config.data, config.output_dir)
    source = open_source(config.data)
    network = stated_config(config.init_from).network if config.init_from else config.network
    size = config.image_size or network.input_size
    return Outline((source.channels, size, size), source.class_names, Pixels.spec)


def run_settings(config: TrainConfig, model: RemixConfig) -> dict[str, Any]:
    """Return the contents of a run's config.json."""
    shards = encoded_data(config)
    return {
        **config.to_json(),
        "data": location(config.data),
        "init_from": location(config.init_from) if config.init_from else None,
        "further_bases": [location(name) for name in config.further_bases],
        # The network that is trained, which the given model may have decided.
        "network": asdict(model.network),
        "mixture": {**asdict(config.mixture), "intervals": config.interval_policy},
        # Intervals for which losses are logged: the experts', or a plain DiT's strata.
        "boundaries": list(training_strata(model, config).boundaries),
        "data_digest": shards.digest if shards is not None else None,
    }


def encoded_data(config: TrainConfig) -> ShardDataset | None:
    """Return the shards of a run, None if its data are not encoded yet."""
    for directory in (Path(config.data), config.output_dir / DATA_DIR):
        if is_shard_dir(directory):
            return ShardDataset(directory)
    return None


def stretched_schedules(config: TrainConfig) -> str:
    """Return a warning for a resumed run whose schedules are stretched, "" if none are."""
    stated, newest = stated_settings(config.output_dir), newest_checkpoint(config.output_dir)
    before, mixture = (stated or {}).get("steps"), config.mixture
    names = ["lr_schedule cosine"] if config.optimizer.lr_schedule == "cosine" else []
    if mixture.prior_strength and mixture.prior_schedule == "linear":
        names.append("prior_schedule linear")
    if newest is None or before == config.steps or not names:
        return ""
    done = steps_done(newest)
    return (
        f"the end of {' and '.join(names)} moves from step {before} to {config.steps}: up to step "
        f"{done} this run is one of {before} steps, from there on one of {config.steps}, so its "
        "result is that of neither"
    )


class Start(NamedTuple):
    """The configuration and the weights of the model with which a run begins."""

    config: RemixConfig
    weights: Callable[[], Iterator[tuple[str, Tensor]]]
    """Yields whole weights by name on disk, one at a time: K copies of all of them may not fit."""
    remark: str = ""
    """What the user may not expect, in one line."""

    def fill(self, model: RemixDiT, device: torch.device) -> int:
        """Give a model without storage its weights, or this process's part of them.

        Returns:
            A checksum of the weights, equal on all processes that begin with the same.
        """
        give_storage(model.network, device)
        own = {name: key for key, name in model.experts.disk_names().items()}
        targets = model.network.state_dict(keep_vars=True)
        checksum = 0
        for name, values in self.weights():
            fill(targets[own[name]], values)
            checksum += checksum_of(values)
        return checksum % 2**62


def give_storage(network: nn.Module, device: torch.device) -> None:
    """Give parameters on the meta device storage on a device, sharded or not."""
    buffers = {name: buffer for name, buffer in network.named_buffers() if not buffer.is_meta}
    network.to_empty(device=device)
    for name, buffer in buffers.items():
        network.get_buffer(name).copy_(buffer)


def starting_model(config: TrainConfig, data: Outline) -> Start:
    """Return the model that a run starts with: new, remixed from a plain DiT, or given."""
    newest = newest_checkpoint(config.output_dir)
    if config.init_from and newest is not None:
        # The checkpoint replaces the model that the run started from, which may no longer exist.
        return Start(model_config(newest), lambda: iter(()))
    given = load_model(config.init_from) if config.init_from else None
    config = settled(config, given.config if given else None)
    labels = None if given is None else label_rows(given.config, data, config.new_labels)
    target = target_config(config, data, given)
    RemixDiT.empty(target)  # refuses what cannot be mixed, before anything is written
    if given is None:
        network = DiT(target.network, config.seed)
        return Start(target, partial(remixed_weights, target, network, config))
    refuse_other_network(given.config, target)
    if given.num_experts > 1:
        refuse_further_bases(config, given.num_experts)
        refuse_other_mixture(given.config, target)
        weights = partial(carried_weights, given, target, labels, config.seed)
        return Start(target, weights, resampling_remark(given.config, target))
    network = adapted(given.expert(0), target.network, labels, config.seed)
    if config.further_bases:
        return start_from_several(config, data, target, given.config, network)
    if config.train == "coefficients":
        raise ValueError(
            "train must be all for bases that begin as copies of one network, whose coefficients "
            f"change nothing, got {config.train}"
        )
    return Start(target, partial(remixed_weights, target, network, config))


def refuse_further_bases(config: TrainConfig, num_experts: int) -> None:
    """Refuse networks beside a mixture, which has bases already."""
    if config.further_bases:
        raise ValueError(
            f"num_experts of {config.init_from} must be 1, a plain DiT, got {num_experts}"
        )


def start_from_several(
    config: TrainConfig,
    data: Outline,
    target: RemixConfig,
    first: RemixConfig,
    network: DiT,
) -> Start:
    """Return the mixture whose bases are several plain networks.

    Args:
        config: The run.
        data: Outline of its data.
        target: Configuration of the mixture.
        first: Configuration of the first network, before it was adapted.
        network: The first network, adapted to the data.
    """
    networks = [network]
    for other in further_models(config.further_bases, first, str(config.init_from)):
        labels = label_rows(other.config, data, config.new_labels)
        networks.append(adapted(other.expert(0), target.network, labels, config.seed))
    refuse_unmixed_differences(target, networks)
    symmetry = config.mixture.symmetry_of(len(networks))
    return Start(target, partial(stacked_weights, target, networks, symmetry))


def settled(config: TrainConfig, model: RemixConfig | None) -> TrainConfig:
    """Return a run with the prediction type of the model that it starts from, if it names none.

    Args:
        config: The run.
        model: The model that it starts from; None for a new one, which predicts the noise.
    """
    asked = config.objective.prediction_type
    if asked == "auto":
        found = model.prediction_type if model else "epsilon"
        return replace(config, objective=replace(config.objective, prediction_type=found))
    if model and asked != model.prediction_type:
        raise ValueError(
            f"--prediction-type must be that of --from, {model.prediction_type}, or be left out, "
            f"got {asked}"
        )
    return config


def label_rows(given: RemixConfig, data: Outline, new_labels: bool) -> list[int] | None:
    """Return the row of the class embedding of each class of the data, and of the null label.

    None if the embedding is learned afresh.
    """
    ours, theirs = side_of("--from", given), side_of_data(data)
    if new_labels:
        match_autoencoders(ours, theirs)
        return None
    try:
        return [*match(ours, theirs), given.network.num_classes]
    except ClassesDifferError as error:
        raise ValueError(f"{error}; --new-labels learns the class embedding afresh") from error


def remixed_weights(
    target: RemixConfig, network: DiT, config: TrainConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a plain network remixed: K copies, which share their memory."""
    outline = RemixDiT.empty(target)
    state, mixture = network.state_dict(), config.mixture
    generator = generator_for(config.seed, "basis noise")
    for key, name in outline.experts.disk_names().items():
        if name == "logits":
            continue
        values = state[key] if key in state else low_rank_start(target, network, key)
        if name.startswith("bases."):
            if key in state:
                values = values.expand(target.num_bases, *values.shape)
            if mixture.basis_noise:
                values = perturbed(values, mixture.basis_noise, generator)
        yield name, values
    table = initial_table(
        target.num_bases, target.num_experts, target.coefficients, mixture.symmetry_of(1)
    )
    yield "logits", table.expand(outline.experts.logits.shape)


def low_rank_start(target: RemixConfig, network: DiT, key: str) -> Tensor:
    """Return the start of a low-rank parameter: (K, r, I) or (K, O, r)."""
    name, _, leaf = key.rpartition(".")
    layer = network.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    down, up = initial_pair(name, layer, target.num_bases, target.rank)
    return down if leaf == "down" else up


def perturbed(bases: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Add normal noise to bases (K, *), `scale` times their root mean square."""
    size = scale * bases.square().mean().sqrt()
    return bases + size * torch.randn(bases.shape, generator=generator, dtype=bases.dtype)


def target_config(config: TrainConfig, data: Outline, given: RemixDiT | None) -> RemixConfig:
    """Return the configuration of the model to train."""
    channels, height, _ = data.shape
    objective, mixture = config.objective, config.mixture
    network = replace(
        given.config.network if given else config.network,
        input_size=height,
        in_channels=channels,
        num_classes=len(data.class_names),
    )
    if objective.prediction_type == "flow_prediction":
        network = replace(network, learn_sigma=False)
    target = RemixConfig(
        network=network,
        num_bases=mixture.num_bases,
        num_experts=mixture.num_experts,
        mixed=mixture.mixed,
        coefficients=mixture.coefficients,
        per_block=mixture.per_block,
        rank=mixture.rank,
        prediction_type=objective.prediction_type,
        num_train_timesteps=given.config.num_train_timesteps if given else 1000,
        class_names=class_names_of(config, data, given),
        autoencoder=data.autoencoder,
        license=given.config.license if given else "",
    )
    if given and given.num_experts == mixture.num_experts > 1 and mixture.intervals == "auto":
        return replace(target, boundaries=given.config.boundaries)
    if config.interval_policy == "uniform":
        return target
    distribution = distribution_of(config)
    cut = cut_intervals(target, mixture.num_experts, config.interval_policy, distribution)
    return replace(target, boundaries=cut.boundaries)


def class_names_of(config: TrainConfig, data: Outline, given: RemixDiT | None) -> tuple[str, ...]:
    """Return the names of the model's classes: the data's, unless these are only numbered."""
    if given is None or config.new_labels or not are_numbers(data.class_names):
        return data.class_names
    return given.config.class_names or data.class_names
