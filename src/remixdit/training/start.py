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
from remixdit.diffusion.dit import DiT, DiTConfig
from remixdit.diffusion.intervals import Intervals, LogitNormal
from remixdit.diffusion.noise import Diffusion, Flow
from remixdit.distributed.parallel import checksum_of, fill
from remixdit.mixture.coefficients import initial_table
from remixdit.mixture.low_rank import initial_pair
from remixdit.model.config import RemixConfig, noise_process
from remixdit.model.loading import load_model, model_config, newest_checkpoint, steps_done
from remixdit.model.model import RemixDiT
from remixdit.seeds import generator_for
from remixdit.training.config import TrainConfig
from remixdit.training.run import DATA_DIR, location, stated_settings
from remixdit.training.several import (
    further_networks,
    refuse_unmixed_differences,
    stacked_weights,
)

__all__ = [
    "Outline",
    "Start",
    "give_storage",
    "outline_of",
    "run_settings",
    "starting_model",
    "stretched_schedules",
    "training_strata",
]


class Outline(NamedTuple):
    """Facts about the data that a model needs; they are known before the data are encoded."""

    shape: tuple[int, int, int]
    """(C, H, W) of a latent."""
    class_names: tuple[str, ...]
    """(num_classes,) names; none for data without labels."""
    autoencoder: Mapping[str, Any]
    """Autoencoder between latents and pixels."""


def outline_of(config: TrainConfig) -> Outline:
    """Return the outline of a run's data, without writing anything."""
    shards = encoded_data(config)
    if shards is not None:
        return Outline(shards.shape, shards.class_names, shards.autoencoder)
    check_apart(config.data, config.output_dir)
    source, size = open_source(config.data), config.image_size or config.network.input_size
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


def training_strata(model: RemixConfig, config: TrainConfig) -> Intervals:
    """Return the intervals in which timesteps are drawn: the experts', or a plain DiT's strata."""
    intervals, strata = model.intervals(), config.objective.timestep_strata
    only = config.objective.only_interval()
    strata = only[1] if only else strata
    if model.num_experts == 1 and strata > 1:
        intervals = cut_intervals(model, strata, config.interval_policy)
    if config.objective.logit_normal:
        intervals = replace(intervals, distribution=LogitNormal())
    return intervals


class Start(NamedTuple):
    """The configuration and the weights of the model with which a run begins."""

    config: RemixConfig
    weights: Callable[[], Iterator[tuple[str, Tensor]]]
    """Yields whole weights by name on disk, one at a time: K copies of all of them may not fit."""

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
    target = target_config(config, data, given)
    RemixDiT.empty(target)  # refuses what cannot be mixed, before anything is written
    if given is not None:
        refuse_other_autoencoder(given.config.autoencoder, data.autoencoder)
    if given is not None and given.num_experts > 1:
        if config.further_bases:
            raise ValueError(
                f"num_experts of {config.init_from} must be 1, a plain DiT, got {given.num_experts}"
            )
        refuse_other_mixture(given.config, target)
        return Start(given.config, lambda: iter(given.weights().items()))
    if given is None:
        network = DiT(target.network, config.seed)
    else:
        network = adapted(given.expert(0), target.network, config)
    if given is not None and config.further_bases:
        others = further_networks(config.further_bases, given.config, str(config.init_from))
        networks = [network, *(adapted(other, target.network, config) for other in others)]
        refuse_unmixed_differences(target, networks)
        return Start(target, partial(stacked_weights, target, networks, config.mixture.symmetry))
    if config.train == "coefficients":
        raise ValueError(
            "train must be all for bases that begin as copies of one network, whose coefficients "
            f"change nothing, got {config.train}"
        )
    return Start(target, partial(remixed_weights, target, network, config))


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
        target.num_bases, target.num_experts, target.coefficients, mixture.symmetry
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
    if given and given.config.prediction_type != objective.prediction_type:
        raise ValueError(
            f"prediction_type must be that of init_from, {given.config.prediction_type}, "
            f"got {objective.prediction_type}"
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
        class_names=data.class_names,
        autoencoder=data.autoencoder,
        license=given.config.license if given else "",
    )
    if given and given.num_experts == mixture.num_experts > 1 and mixture.intervals == "auto":
        return replace(target, boundaries=given.config.boundaries)
    if config.interval_policy == "uniform":
        return target
    cut = cut_intervals(target, mixture.num_experts, config.interval_policy)
    return replace(target, boundaries=cut.boundaries)


def cut_intervals(config: RemixConfig, count: int, policy: str) -> Intervals:
    """Cut the timesteps of a model's noise process into intervals.

    Args:
        config: Configuration of the model.
        count: Number of intervals.
        policy: Unit of equal widths: "uniform" (timesteps) or "log_snr".
    """
    process: Diffusion | Flow = noise_process(config)
    if isinstance(process, Diffusion):
        if policy == "uniform":
            return Intervals.uniform(count, config.num_train_timesteps)
        return Intervals.by_log_snr(count, process.log_snr)
    if policy == "uniform":
        return Intervals.continuous(count)
    return Intervals.continuous_by_log_snr(count, process.log_snr)


def adapted(network: DiT, shape: DiTConfig, config: TrainConfig) -> DiT:
    """Return a pre-trained DiT for these data: any input size, and new labels on request."""
    before = network.config
    if before.in_channels != shape.in_channels or before.learn_sigma != shape.learn_sigma:
        raise ValueError(
            f"init_from must be a model of {shape.in_channels} channels with learn_sigma "
            f"{shape.learn_sigma}, as the data and the objective need, got "
            f"{before.in_channels} and {before.learn_sigma}"
        )
    if before.num_classes != shape.num_classes and not config.new_labels:
        raise ValueError(
            f"init_from must be a model of the data's {shape.num_classes} classes, got "
            f"{before.num_classes}; --new-labels learns the class embedding afresh"
        )
    fresh = DiT(shape, config.seed)
    weights = network.state_dict()
    if before.num_classes != shape.num_classes or config.new_labels:
        weights = {name: v for name, v in weights.items() if not name.startswith("y_embedder")}
    fresh.load_state_dict(weights, strict=False)
    return fresh


def refuse_other_autoencoder(own: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuse latents of another autoencoder than the one that the model was trained with.

    Only fields that both give are compared: an imported model may know no more than a name, and
    the same weights may have another name.
    """
    for name in sorted((own.keys() & other.keys()) - {"name"}):
        if own[name] != other[name]:
            raise ValueError(
                f"{name} of the data's autoencoder must be that of init_from, {own[name]}, "
                f"got {other[name]}"
            )
    if "digest" in own and "digest" not in other:
        raise ValueError(f"data must be latents of {own['name']}, as for init_from, got pixels")


def refuse_other_mixture(given: RemixConfig, target: RemixConfig) -> None:
    """Refuse to train a mixture under settings of another."""
    names = ("num_bases", "num_experts", "mixed", "coefficients", "per_block", "rank")
    pairs = {
        name: (getattr(given, name), getattr(target, name))
        for name in (*names, "boundaries", "prediction_type")
    }
    asked_network = asdict(target.network)
    pairs |= {name: (own, asked_network[name]) for name, own in asdict(given.network).items()}
    for name, (own, asked) in pairs.items():
        if own != asked:
            raise ValueError(f"{name} must be that of init_from, {own}, got {asked}")
