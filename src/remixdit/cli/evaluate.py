"""`remixdit evaluate CHECKPOINT|IMAGES --reference REAL`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from tyro.conf import Fixed, Positional, Suppress

from remixdit import __version__, distributed
from remixdit.bench.latency import model_costs
from remixdit.cli.arguments import base_config, parse, refuse_moved
from remixdit.cli.checkpoints import check_precision, names_model, open_model
from remixdit.cli.evaluation_text import checks_text, images_text
from remixdit.cli.results import as_json, claim, write_json
from remixdit.cli.sample import label_numbers
from remixdit.cli.terminal import follow, show
from remixdit.evaluation.images import ImageConfig, evaluate_images
from remixdit.evaluation.metrics import self_test
from remixdit.evaluation.subjects import Subject, files_subject, model_subject
from remixdit.sampling.sampler import SamplingConfig

__all__ = ["run"]

NUM_SAMPLES = 10_000
RESULT_FILE = "evaluation.json"
MOVED = ("--per-interval", "--against", "--num-intervals", "--matrix-images")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(SamplingConfig):
    """How a model is sampled. Images on disk are samples already and take none of these options."""

    num_images: Suppress[Fixed[int]] = NUM_SAMPLES  # the command's own, as the seed
    seed: Suppress[Fixed[int]] = 0
    class_labels: str = ""  # type: ignore[assignment]  # names need the model
    """Comma-separated labels or class names; images cycle through them. By default all classes."""
    ema: bool = True
    """Use the averaged (EMA) weights of a checkpoint rather than its last ones."""
    precision: str = "fp32"
    """Precision of the network: fp32 or bf16. Features are always fp32."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        super().__post_init__()
        check_precision(self.precision)


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(ImageConfig):
    """Score the samples of a model, or images on disk, against real images."""

    checkpoint: Positional[str] = ""
    """A model, a run or a checkpoint of a run; or images: an .npz, a folder or shards."""
    self_test: bool = False
    """Test every metric on inputs for which its value is known, and do nothing else."""
    num_images: int = 0
    """Number of images to score; 0 for 10,000 samples of a model, or all images on disk."""
    seed: int = 0
    """Seed for the samples, for the choice of images, and for the metrics."""
    image_size: int | None = None
    """Size of images on disk after scaling and cropping, in pixels. By default their own size."""
    output: Path | None = None
    """File for the result, a .json, or a directory for evaluation.json."""
    overwrite: bool = False
    """Replace an earlier result."""
    json: bool = False
    """Print the whole result as JSON."""
    device: str = "auto"
    """Device: auto, cpu or cuda. auto is the GPU if there is one."""
    sampling: SamplingOptions = SamplingOptions()

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        super().__post_init__()
        if self.num_images < 0:
            raise ValueError(f"num_images must be at least 0, got {self.num_images}")


def run(args: Sequence[str]) -> None:
    """Evaluate."""
    refuse_moved(args, MOVED, "losses CHECKPOINT --data HELD_OUT")
    arguments = parse(EvaluateArguments, args, "evaluate")
    if arguments.self_test:
        test(arguments)
        return
    try:
        evaluate(arguments)
    finally:
        distributed.stop()


def test(arguments: EvaluateArguments) -> None:
    """Run the metrics on inputs for which their values are known."""
    kept = EvaluateArguments(self_test=True, json=arguments.json, device=arguments.device)
    refuse_changed(arguments, kept, "--self-test")
    checks = self_test(distributed.pick_device(arguments.device))
    rows = [{**check._asdict(), "passed": check.passed} for check in checks]
    show(as_json(rows) if arguments.json else checks_text(checks))
    failed = sum(not check.passed for check in checks)
    if failed:
        raise ArithmeticError(f"{failed} of {len(checks)} checks failed")


def evaluate(arguments: EvaluateArguments) -> None:
    """Measure, print and write."""
    if not arguments.checkpoint:
        raise ValueError("checkpoint must be given: a model, or images to score")
    is_model = names_model(arguments.checkpoint)
    if is_model and arguments.image_size is not None:
        raise ValueError(f"image_size must be left out for a model, got {arguments.image_size}")
    if not is_model:
        refuse_changed(arguments.sampling, SamplingOptions(), "images on disk")
    output = output_file(arguments.output)
    claim([output] if output else [], arguments.overwrite)
    device = distributed.pick_device(arguments.device)
    if is_model:
        result = of_model(arguments, device)
    else:
        subject = files_subject(
            arguments.checkpoint,
            arguments.num_images,
            arguments.image_size,
            arguments.seed,
            device,
        )
        result = scored(arguments, subject, device)
    distributed.barrier()
    if result:
        result = {"remixdit": __version__, **result}
        if output:
            write_json(output, result)
        show(as_json(result) if arguments.json else images_text(result))


def refuse_changed(options: Any, unchanged: Any, what: str) -> None:
    """Refuse options that would change nothing."""
    for field in fields(options):
        value = getattr(options, field.name)
        if value != getattr(unchanged, field.name):
            raise ValueError(f"{field.name} must be left out for {what}, got {value!r}")


def of_model(arguments: EvaluateArguments, device: torch.device) -> dict[str, Any]:
    """Score samples of a model; the result is empty on all processes but the first."""
    ema, precision = arguments.sampling.ema, arguments.sampling.precision
    model = open_model(arguments.checkpoint, ema=ema, precision=precision, device=device)
    sampling = replace(
        base_config(arguments.sampling, SamplingConfig),
        num_images=arguments.num_images or NUM_SAMPLES,
        seed=arguments.seed,
        class_labels=label_numbers(arguments.sampling.class_labels, model.config),
    )
    facts = {"precision": precision, "ema": ema}
    subject = model_subject(arguments.checkpoint, model, sampling, facts)
    result = scored(arguments, subject, device)
    if not result:
        return {}
    return {**result, "cost": model_costs(arguments.checkpoint, model, sampling, ema)}


def scored(arguments: EvaluateArguments, subject: Subject, device: torch.device) -> dict[str, Any]:
    """Score images; the result is empty on all processes but the first."""
    ranks = distributed.start(device)
    config = base_config(arguments, ImageConfig)
    work = evaluate_images(subject, config, device, ranks, arguments.seed)
    return follow(work, dict.fromkeys(("reference", "train", "samples"), "images"))


def output_file(output: Path | None) -> Path | None:
    """Return the file to write, if one was asked for."""
    if output is None or output.suffix == ".json":
        return output
    if output.suffix and not output.is_dir():
        raise ValueError(f"output must be a .json or a directory, got {output}")
    return output / RESULT_FILE
