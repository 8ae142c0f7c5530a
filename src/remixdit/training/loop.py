"""Training: one loop for plain and remixed models.

    draw the step from (seed, step): intervals, timesteps, noise, dropped labels
    run all images, each through its expert, and back-propagate
    one update of bases, shared parameters and logits, and of their average

A run is a directory:

    config.json         the configuration, and the digest of the data
    metrics.jsonl       a line every log_every steps
    coefficients.jsonl  the table of a mixture, at fewer steps
    checkpoints/        the newest few checkpoints
    samples/            grids of images from the averaged weights
    tensorboard/        curves and images
    tracker-id          identity of the run for wandb and trackio
    model/              the averaged weights of a finished run
"""

import json
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from remixdit import distributed
from remixdit.data import (
    EncodeConfig,
    ShardDataset,
    check_batch_size,
    is_shard_dir,
    prepare,
)
from remixdit.distributed import Ranks
from remixdit.model.loading import newest_checkpoint, steps_done
from remixdit.progress import Progress, finish
from remixdit.training.checkpoint import refuse_damaged
from remixdit.training.config import MAY_CHANGE, TrainConfig
from remixdit.training.recorder import Recorder, is_due
from remixdit.training.run import (
    DATA_DIR,
    check_run,
    claim_run,
    is_same,
    only_run,
    stated_settings,
)
from remixdit.training.start import (
    Start,
    outline_of,
    run_settings,
    settled,
    starting_model,
    stretched_schedules,
)
from remixdit.training.stopping import Stop, Watch
from remixdit.training.trackers import check_installed
from remixdit.training.trainer import Training

__all__ = ["train"]

logger = logging.getLogger(__name__)


def train(config: TrainConfig, stop: Stop | None = None) -> Generator[Progress, None, None]:
    """Train; the progress of every step, and before that of encoding, is reported.

    The caller may stop at any time: the run goes on from its last checkpoint when the same
    configuration is trained again. The numbers of a run are in its `metrics.jsonl`.

    Args:
        config: The run.
        stop: Asked by the caller to end the run early: it saves after the step, then ends.

    Yields:
        Progress of the stages "encode", if the data are not encoded yet, and "train", in steps.
    """
    ranks = distributed.start(distributed.pick_device(config.device))
    # Everything that can be refused is refused before the run's directory is made.
    check_batch_size(config.batch_size, ranks.num_ranks)
    check_installed(config.output.tracker)
    refuse_damaged(config.output_dir, config.allow_older, ranks.is_first)
    check_steps(config)
    check_shard_size(config, ranks)
    start = starting_model(config, outline_of(config))
    config = settled(config, start.config if config.init_from else None)
    settings = run_settings(config, start.config)
    # Encoded data are identified by their digest; others, before encoding, by their path.
    unknown = "data" if settings["data_digest"] else "data_digest"
    defaults = settled(TrainConfig(data="", output_dir=config.output_dir), None).to_json()
    check_run(config.output_dir, settings, {*MAY_CHANGE, unknown}, defaults)
    with only_run(config.output_dir) if ranks.is_first else nullcontext():
        dataset = yield from open_dataset(config, ranks, start.config.network.input_size)
        settings["data_digest"] = dataset.digest
        training = begun(config, settings, start, dataset, ranks)
        yield from steps_of(config, training, stop or Stop())


def begun(
    config: TrainConfig,
    settings: Mapping[str, Any],
    start: Start,
    dataset: ShardDataset,
    ranks: Ranks,
) -> Training:
    """Return the run at the step from which it goes on, after all processes agree on it."""
    defaults = settled(TrainConfig(data="", output_dir=config.output_dir), None).to_json()
    check_run(config.output_dir, settings, {*MAY_CHANGE, "data"}, defaults)
    remarks = (start.remark, stretched_schedules(config), *doubts(config, dataset))
    for remark in filter(None, remarks):
        if ranks.is_first:
            logger.warning(remark)
    training = Training(config, start, dataset, ranks)
    training.resume()  # first, as a checkpoint may be damaged
    distributed.agree(
        {
            "step": training.step,
            "configuration": json.dumps(settings, sort_keys=True, default=str),
            "data": dataset.digest,
            "weights": training.checksum,
        }
    )
    if ranks.is_first:
        claim_run(config.output_dir, settings)
    distributed.barrier()
    return training


def steps_of(config: TrainConfig, training: Training, stop: Stop) -> Iterator[Progress]:
    """Take the remaining steps."""
    output, loss = config.output, None
    recorder, watch = Recorder(config, training), Watch(config.output, training.ranks, stop)
    try:
        recorder.begin()
        for inputs in training.batches():
            if training.step >= config.steps:
                break
            first = training.step
            training.take_step(inputs)
            if first == recorder.first_step:
                watch.wishes.lose_patience()
                stop.waits = True
            ends, saves = watch.after_step(is_due(training.step, config, output.save_every))
            metrics = None
            if saves or is_due(training.step, config, output.log_every):
                metrics = training.metrics()
                loss = metrics["loss"]
            recorder.record(metrics, saves)
            notes = (
                loss_note(loss, training),
                experts_note(inputs.plan.strata),
                recorder.saved_note(),
            )
            yield Progress("train", training.step, config.steps, ", ".join(filter(None, notes)))
            if ends:
                break
        watch.wishes.read()
        if training.step >= config.steps:
            recorder.finish()
    finally:
        recorder.close()
    distributed.barrier()


def loss_note(loss: float | None, training: Training) -> str:
    """Return the loss of the last line of metrics, before the first one the loss so far."""
    loss = training.loss_so_far() if loss is None else loss
    return "" if loss is None else f"loss {loss:.4f}"


def experts_note(experts: Sequence[int]) -> str:
    """Return which experts, or strata, a step trained."""
    if len(experts) > 4:
        return f"{len(experts)} experts"
    return f"expert{'s' * (len(experts) > 1)} {' '.join(map(str, experts))}"


def doubts(config: TrainConfig, dataset: ShardDataset) -> Iterator[str]:
    """Yield a line for each setting that may not have been meant."""
    warmup = config.optimizer.warmup_steps
    if warmup > config.steps:
        yield f"warmup_steps {warmup} is longer than the run of {config.steps} steps"
    if Path(config.data).is_dir() and not dataset.class_names:
        yield f"{config.data} has no folders of classes, so no classes are learned"


def check_steps(config: TrainConfig) -> None:
    """Refuse fewer steps than the run has already done."""
    newest = newest_checkpoint(config.output_dir)
    done = steps_done(newest) if newest else 0
    if config.steps < done:
        raise ValueError(
            f"steps must be at least the {done} that the run has done, got {config.steps}"
        )


def check_shard_size(config: TrainConfig, ranks: Ranks) -> None:
    """Refuse groups that do not hold the same number of processes."""
    if config.shard_size and ranks.num_ranks > 1 and ranks.num_ranks % config.shard_size:
        raise ValueError(
            f"shard_size must divide the {ranks.num_ranks} processes, got {config.shard_size}"
        )


def open_dataset(
    config: TrainConfig, ranks: Ranks, image_size: int
) -> Generator[Progress, None, ShardDataset]:
    """Open the shards, or encode the images of a source once into the run's directory."""
    encode = EncodeConfig(image_size=image_size, seed=config.seed, strict=config.strict)
    cache, source = config.output_dir / DATA_DIR, needed_source(config)
    if ranks.is_first:
        tell_of_skipped(config, (yield from prepare(source, cache, encode)))
    distributed.barrier()
    return finish(prepare(source, cache, encode))


def needed_source(config: TrainConfig) -> str:
    """Return where to read the data: a run that has encoded them does without their source."""
    cache, stated = config.output_dir / DATA_DIR, stated_settings(config.output_dir) or {}
    is_gone = not Path(config.data).exists()
    if is_gone and is_shard_dir(cache) and is_same("data", stated.get("data"), config.data):
        return str(cache)
    return config.data


def tell_of_skipped(config: TrainConfig, dataset: ShardDataset) -> None:
    """Warn of images that could not be read; refuse the data when strict."""
    skipped = dataset.index["skipped"]
    if not skipped:
        return
    text = (
        f"{len(skipped)} of {len(skipped) + len(dataset)} images of {config.data} are left out, "
        f"such as {skipped[0]['image']}: {skipped[0]['reason']}"
    )
    if config.strict:
        raise ValueError(f"data must hold no image that cannot be read when strict: {text}")
    logger.warning(text)
