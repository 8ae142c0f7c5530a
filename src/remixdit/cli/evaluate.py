"""`remixdit evaluate CHECKPOINT|NPZ|FOLDER`."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tyro.conf import Positional

from remixdit import __version__, distributed
from remixdit.bench.latency import model_costs
from remixdit.cli.arguments import base_config, parse
from remixdit.cli.evaluation_text import checks_text, images_text, intervals_text
from remixdit.cli.sample import label_numbers
from remixdit.cli.terminal import follow, say
from remixdit.data import is_shard_dir
from remixdit.evaluation.experts import IntervalConfig, Rival, evaluate_intervals, open_held
from remixdit.evaluation.images import ImageConfig, evaluate_images
from remixdit.evaluation.metrics import self_test
from remixdit.evaluation.subjects import Subject, files_subject, model_subject
from remixdit.files import write_file
from remixdit.model.loading import load_model
from remixdit.model.model import RemixDiT
from remixdit.sampling.sampler import SamplingConfig
from remixdit.training.config import PRECISIONS

__all__ = ["run"]

NUM_SAMPLES = 10_000
MODEL_FILES = ("config.json", "model.safetensors", "state.json", "metrics.jsonl")
RESULT_FILE, MATRIX_FILE, LOSS_FILE = "evaluation.json", "loss-matrix.png", "loss-by-interval.png"

ALWAYS = {"num_images", "seed", "batch_size", "reference", "split"}
OF_SAMPLES = {field.name for field in fields(SamplingConfig)} - ALWAYS
OF_IMAGES = {field.name for field in fields(ImageConfig)} - ALWAYS
OF_INTERVALS = {field.name for field in fields(IntervalConfig)}


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(ImageConfig, IntervalConfig, SamplingConfig):
    """Score what a model draws, or images on disk, against real images."""

    checkpoint: Positional[str] = ""
    """A model, a run or a checkpoint of one; or images: an .npz, a folder, shards."""
    per_interval: bool = False
    """Measure instead every expert on every interval of timesteps, on held-out images."""
    self_test: bool = False
    """Run every metric where its value is known, and nothing else."""
    num_images: int = 0
    """By default 10,000 samples of a model, all images on disk, up to 1,000 held-out ones."""
    class_labels: str = ""  # type: ignore[assignment]  # names need the model
    """Numbers or names with commas between; samples cycle through them. By default all classes."""
    seed: int = 0
    """Of samples, timesteps, noise, and which images are drawn."""
    image_size: int | None = None
    """Scale and cut images on disk to it; by default they must be of one size."""
    output: Path | None = None
    """A .json for the result, a .png for the matrix of --per-interval, a directory for both."""
    overwrite: bool = False
    """Replace what is there."""
    json: bool = False
    """Print everything as JSON."""
    ema: bool = True
    """Take the averaged weights of a run that has not finished."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "fp32"
    """fp32 or bf16, of the model; features are always fp32."""

    def __post_init__(self) -> None:
        """Refuse values outside their range, and those that the rest leaves without a meaning."""
        ImageConfig.__post_init__(self)
        IntervalConfig.__post_init__(self)
        self.sampling()
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")

    def sampling(self, class_labels: tuple[int, ...] = ()) -> SamplingConfig:
        """Return how a model's images are drawn."""
        values = {field.name: getattr(self, field.name) for field in fields(SamplingConfig)}
        count = self.num_images or NUM_SAMPLES
        return SamplingConfig(**{**values, "num_images": count, "class_labels": class_labels})


def run(args: Sequence[str]) -> None:
    """Evaluate."""
    arguments = parse(EvaluateArguments, args, "evaluate")
    if arguments.self_test:
        test(arguments)
        return
    try:
        evaluate(arguments)
    finally:
        distributed.stop()


def test(arguments: EvaluateArguments) -> None:
    """Run the metrics where their values are known."""
    checks = self_test(distributed.pick_device(arguments.device))
    rows = [{**check._asdict(), "passed": check.passed} for check in checks]
    print(as_json(rows) if arguments.json else checks_text(checks))
    failed = sum(not check.passed for check in checks)
    if failed:
        raise ArithmeticError(f"{failed} of {len(checks)} checks failed")


def evaluate(arguments: EvaluateArguments) -> None:
    """Measure, print and write."""
    if not arguments.checkpoint:
        raise ValueError("checkpoint must be given: a model, or images to score")
    is_model = names_model(arguments.checkpoint)
    refuse_unused(arguments, is_model)
    claim(arguments)
    device = distributed.pick_device(arguments.device)
    if arguments.per_interval:
        result = by_interval(arguments, device)
    elif is_model:
        result = of_model(arguments, device)
    else:
        subject = files_subject(
            arguments.checkpoint, arguments.num_images, arguments.image_size, arguments.seed
        )
        result = scored(arguments, subject, device)
    distributed.barrier()
    if result:
        deliver(arguments, result)


def names_model(path: str) -> bool:
    """Whether a path, or a name of the hub, is that of a model rather than of images."""
    found = Path(path)
    if found.is_dir():
        return not is_shard_dir(found) and any((found / name).is_file() for name in MODEL_FILES)
    return is_hub_name(path)


def is_hub_name(path: str) -> bool:
    """Whether something that does not exist may be a model of the hub, owner/name."""
    found = Path(path)
    if found.exists() or found.is_absolute() or found.suffix:
        return False
    return len(found.parts) == 2 and not found.parent.exists()


def refuse_unused(arguments: EvaluateArguments, is_model: bool) -> None:
    """Refuse options that would change nothing."""
    unused: dict[str, set[str]] = {
        "images on disk": set() if is_model else OF_SAMPLES | {"ema", "precision"},
        "a model": {"image_size"} if is_model else set(),
        "--per-interval": (OF_IMAGES | OF_SAMPLES) if arguments.per_interval else set(),
        "scores of images (it belongs to --per-interval)": set()
        if arguments.per_interval
        else OF_INTERVALS,
    }
    if arguments.per_interval and not is_model:
        raise ValueError(
            f"checkpoint must be a model for --per-interval, got {arguments.checkpoint}"
        )
    default = EvaluateArguments()
    for what, names in unused.items():
        for name in sorted(names):
            value = getattr(arguments, name)
            if value != getattr(default, name):
                raise ValueError(f"{name} must be left out for {what}, got {value!r}")


def of_model(arguments: EvaluateArguments, device: torch.device) -> dict[str, Any]:
    """Score what a model draws."""
    model = opened(arguments.checkpoint, arguments, device)
    labels = label_numbers(arguments.class_labels, model.config.class_names)
    sampling = arguments.sampling(labels)
    facts = {"precision": arguments.precision, "ema": arguments.ema}
    subject = model_subject(arguments.checkpoint, model, sampling, facts)
    result = scored(arguments, subject, device)
    return with_cost(result, arguments, model, sampling)


def scored(arguments: EvaluateArguments, subject: Subject, device: torch.device) -> dict[str, Any]:
    """Score images, with a bar for each stage; empty on all processes but the first."""
    ranks = distributed.start(device)
    config = base_config(arguments, ImageConfig)
    work = evaluate_images(subject, config, device, ranks, arguments.seed)
    return follow(work, dict.fromkeys(("reference", "train", "samples"), "images"))


def by_interval(arguments: EvaluateArguments, device: torch.device) -> dict[str, Any]:
    """Measure experts on intervals; empty on all processes but the first."""
    model = opened(arguments.checkpoint, arguments, device)
    held, reference = open_held(
        arguments.reference, model, arguments.num_images, arguments.split, arguments.seed
    )
    rival = None
    if arguments.against:
        rival = Rival(arguments.against, opened(arguments.against, arguments, device))
    ranks = distributed.start(device)
    result = follow(
        evaluate_intervals(
            model,
            held,
            base_config(arguments, IntervalConfig),
            rival,
            ranks=ranks,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
        )
    )
    if not ranks.is_first:
        return {}
    about = {
        "evaluated": {
            "checkpoint": arguments.checkpoint,
            "against": arguments.against,
            "prediction_type": model.config.prediction_type,
            "num_experts": model.num_experts,
            "seed": arguments.seed,
            "precision": arguments.precision,
            "ema": arguments.ema,
        },
        "reference": reference,
    }
    sampling = SamplingConfig(batch_size=arguments.batch_size)
    return with_cost({**about, **result}, arguments, model, sampling)


def opened(path: str, arguments: EvaluateArguments, device: torch.device) -> RemixDiT:
    """Load a model, in its precision."""
    if not Path(path).exists() and not is_hub_name(path):  # nothing to wait for the network for
        raise ValueError(f"{path}: no such model, nor owner/name on the hub")
    model = load_model(path, ema=arguments.ema, device=str(device))
    model.mixture.cast_network(PRECISIONS[arguments.precision])
    return model


def with_cost(
    result: dict[str, Any],
    arguments: EvaluateArguments,
    model: RemixDiT,
    sampling: SamplingConfig,
) -> dict[str, Any]:
    """Add what the model costs, on the process that has a result."""
    if not result:
        return {}
    return {**result, "cost": model_costs(arguments.checkpoint, model, sampling, arguments.ema)}


def outputs(arguments: EvaluateArguments) -> dict[str, Path]:
    """Return the files to write, by what they hold."""
    output = arguments.output
    if output is None:
        return {}
    if output.suffix == ".json":
        return {"result": output}
    if output.suffix == ".png":
        if not arguments.per_interval:
            raise ValueError(
                f"output must be a .json or a directory without --per-interval, got {output}"
            )
        return {"matrix": output}
    if output.suffix and not output.is_dir():
        raise ValueError(f"output must be a .json, a .png or a directory, got {output}")
    files = {"result": output / RESULT_FILE}
    if arguments.per_interval:
        files |= {"matrix": output / MATRIX_FILE, "losses": output / LOSS_FILE}
    return files


def claim(arguments: EvaluateArguments) -> None:
    """Make sure that results can go where they shall, before long work begins."""
    for path in outputs(arguments).values():
        if path.exists() and not arguments.overwrite:
            raise ValueError(f"output must not exist (--overwrite replaces it), got {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"output must be in a directory, got {path.parent}") from error


def deliver(arguments: EvaluateArguments, result: dict[str, Any]) -> None:
    """Write what was asked for and print the result."""
    result = {"remixdit": __version__, **result}
    text = as_json(result)
    for what, path in outputs(arguments).items():
        if what == "result":
            write_file(path, lambda beside: beside.write_text(text + "\n", "utf-8"))
        elif not draw(what, path, result):
            continue
        say(f"wrote {path}")
    show = intervals_text if arguments.per_interval else images_text
    print(text if arguments.json else show(result))


def draw(what: str, path: Path, result: Mapping[str, Any]) -> bool:
    """Draw the matrix or the losses; return whether there is something to draw."""
    from remixdit.figures import plots  # matplotlib takes a while

    rows = result["intervals"]
    boundaries = [row["from"] for row in rows] + [rows[-1]["to"]]
    if what == "matrix":
        matrix = result["matrix"]
        if matrix["value"] is None:
            say(f"no matrix: {matrix['left_out']}")
            return False
        plots.save(plots.loss_matrix(matrix["value"], boundaries), path)
        return True
    series = {result["evaluated"]["checkpoint"]: [row["value"] for row in rows]}
    errors = {result["evaluated"]["checkpoint"]: [row["standard_error"] for row in rows]}
    if "against" in rows[0]:
        name = result["evaluated"]["against"]
        series = {name: [row["against"]["value"] for row in rows], **series}
        errors = {name: [row["against"]["standard_error"] for row in rows], **errors}
    plots.save(plots.loss_by_interval(series, boundaries, errors), path)
    return True


def as_json(result: Any) -> str:
    """Return strict JSON: a number that is none becomes null."""
    return json.dumps(finite(result), indent=1, ensure_ascii=False, allow_nan=False)


def finite(value: Any) -> Any:
    """Return JSON values with None for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [finite(item) for item in value]
    return value
