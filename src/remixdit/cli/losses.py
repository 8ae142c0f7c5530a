"""`remixdit losses CHECKPOINT --data HELD_OUT`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from remixdit import __version__, distributed
from remixdit.bench.latency import model_costs
from remixdit.cli.arguments import base_config, parse
from remixdit.cli.checkpoints import check_precision, open_model
from remixdit.cli.evaluation_text import intervals_text
from remixdit.cli.results import as_json, claim, write_json, write_result
from remixdit.cli.terminal import follow, say, show
from remixdit.evaluation.experts import LossesConfig, Rival, evaluate_intervals, stated_strata
from remixdit.evaluation.held_out import open_held_out
from remixdit.model.model import RemixDiT
from remixdit.sampling.sampler import SamplingConfig

__all__ = ["run"]

RESULT_FILE = "losses.json"
MATRIX_FILE = "loss-matrix.png"
INTERVAL_FILE = "held-out-loss-by-interval.png"  # loss-by-interval.png is that of training


@dataclass(frozen=True, kw_only=True)
class LossesArguments(LossesConfig):
    """Measure experts against intervals on held-out images: losses, matrix, bits per dimension."""

    checkpoint: Positional[str]
    """A model directory, a run, a checkpoint of a run, or a model on the Hugging Face Hub."""
    data: str
    """Held-out images: shards that fit the model, or any source for a model of pixels."""
    split: str | None = None
    """Name of the split of the data, e.g. test."""
    num_images: int = 0
    """Number of held-out images, chosen by the seed; 0 for all of them, up to 1,000."""
    against: str | None = None
    """A second model to compare with, measured on the same images, timesteps and noise."""
    output: Path | None = None
    """A .json for the result, a .png for the matrix, or a directory for all results and figures."""
    overwrite: bool = False
    """Replace an earlier result."""
    json: bool = False
    """Print the whole result as JSON."""
    ema: bool = True
    """Use the averaged (EMA) weights of a checkpoint rather than its last ones."""
    device: str = "auto"
    """Device: auto, cpu or cuda. auto is the GPU if there is one."""
    precision: str = "fp32"
    """Precision of the network: fp32 or bf16."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        super().__post_init__()
        check_precision(self.precision)


def run(args: Sequence[str]) -> None:
    """Measure, print and write."""
    arguments = parse(LossesArguments, args, "losses")
    claim(outputs(arguments.output).values(), arguments.overwrite)
    try:
        result = measured(arguments)
        distributed.barrier()
    finally:
        distributed.stop()
    if result:
        deliver(arguments, {"remixdit": __version__, **result})


def measured(arguments: LossesArguments) -> dict[str, Any]:
    """Measure experts on intervals; the result is empty on all processes but the first."""
    device = distributed.pick_device(arguments.device)

    def opened(path: str) -> RemixDiT:
        return open_model(path, ema=arguments.ema, precision=arguments.precision, device=device)

    model = opened(arguments.checkpoint)
    held, facts = open_held_out(
        arguments.data, model.config, arguments.num_images, arguments.split, arguments.seed
    )
    rival = Rival(arguments.against, opened(arguments.against)) if arguments.against else None
    ranks = distributed.start(device)
    work = evaluate_intervals(
        model,
        held,
        base_config(arguments, LossesConfig),
        rival,
        strata=stated_strata(Path(arguments.checkpoint)),
        ranks=ranks,
    )
    result = follow(work)
    if not ranks.is_first:
        return {}
    sampling = SamplingConfig(batch_size=arguments.batch_size)
    return {
        "evaluated": evaluated_facts(arguments, model),
        "data": facts,
        **result,
        "cost": model_costs(arguments.checkpoint, model, sampling, arguments.ema),
    }


def evaluated_facts(arguments: LossesArguments, model: RemixDiT) -> dict[str, Any]:
    """Return the model and the conditions of the measurement, as JSON values."""
    return {
        "checkpoint": arguments.checkpoint,
        "against": arguments.against,
        "prediction_type": model.config.prediction_type,
        "num_experts": model.num_experts,
        "seed": arguments.seed,
        "precision": arguments.precision,
        "ema": arguments.ema,
    }


def outputs(output: Path | None) -> dict[str, Path]:
    """Return the files to write, by their content."""
    if output is None:
        return {}
    if output.suffix == ".json":
        return {"result": output}
    if output.suffix == ".png":
        return {"matrix": output}
    if output.suffix and not output.is_dir():
        raise ValueError(f"output must be a .json, a .png or a directory, got {output}")
    names = {"result": RESULT_FILE, "matrix": MATRIX_FILE, "losses": INTERVAL_FILE}
    return {what: output / name for what, name in names.items()}


def deliver(arguments: LossesArguments, result: dict[str, Any]) -> None:
    """Write the requested files and print the result."""
    for what, path in outputs(arguments.output).items():
        if what == "result":
            write_json(path, result)
        else:
            draw(what, path, result)
    show(as_json(result) if arguments.json else intervals_text(result))


def draw(what: str, path: Path, result: Mapping[str, Any]) -> None:
    """Draw the matrix or the losses, where there is something to draw."""
    from remixdit.evaluation.loss_figures import interval_figure, matrix_figure
    from remixdit.figures.plots import save  # matplotlib takes a while

    if what == "matrix" and result["matrix"]["value"] is None:
        say(f"no matrix: {result['matrix']['left_out']}")
        return
    evaluated = result["evaluated"]
    figure = (
        matrix_figure(result, evaluated["checkpoint"])
        if what == "matrix"
        else interval_figure(result, evaluated["checkpoint"], evaluated["against"])
    )
    write_result(path, lambda beside: save(figure, beside))
