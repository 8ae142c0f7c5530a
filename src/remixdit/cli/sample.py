"""`remixdit sample CHECKPOINT`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from tyro.conf import Positional

from remixdit import distributed
from remixdit.cli.arguments import base_config, parse
from remixdit.cli.checkpoints import load_newest, open_autoencoder
from remixdit.cli.results import claim as claim_files
from remixdit.cli.results import write_result
from remixdit.cli.terminal import Bar, say
from remixdit.model.config import RemixConfig
from remixdit.model.imagenet import has_imagenet_names, imagenet_label, imagenet_names, shown_names
from remixdit.model.model import RemixDiT
from remixdit.sampling.files import claim, target_of, write_about, write_samples
from remixdit.sampling.sampler import SamplingConfig, labels_of, sample
from remixdit.sampling.strips import draw_strips
from remixdit.training.config import PRECISIONS

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class SampleArguments(SamplingConfig):
    """Sample images from a model. Image i depends only on the seed and i."""

    checkpoint: Positional[str]
    """A model directory, a run, a checkpoint of a run, or a model on the Hugging Face Hub."""
    output: str
    """A .png for one grid, an .npz for arrays, or a directory for one file per image."""
    strips: Path | None = None
    """A .png that also shows how the first 4 images emerge, and the expert of each step."""
    overwrite: bool = False
    """Replace the samples of an earlier run of this command."""
    class_labels: str = ""  # type: ignore[assignment]  # names need the model
    """Comma-separated labels or class names; images cycle through them. By default all classes."""
    ema: bool = True
    """Use the averaged (EMA) weights of a checkpoint rather than its last ones."""
    device: str = "auto"
    """Device: auto, cpu or cuda. auto is the GPU if there is one."""
    precision: str = "fp32"
    """Precision of the network: fp32 or bf16."""
    compile: bool = False
    """Compile the network once for all experts. It starts slowly and then samples faster."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        super().__post_init__()
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")
        if self.strips is not None and self.strips.suffix != ".png":
            raise ValueError(f"strips must be a .png, got {self.strips}")


def run(args: Sequence[str]) -> None:
    """Sample."""
    arguments = parse(SampleArguments, args, "sample")
    try:
        draw(arguments)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted; a directory without samples.json is not whole, --overwrite begins again"
        ) from None
    finally:
        distributed.stop()


def draw(arguments: SampleArguments) -> None:
    """Draw the images and write them."""
    target = target_of(arguments.output)
    device = distributed.pick_device(arguments.device)
    model = load_newest(arguments.checkpoint, arguments.ema, device)
    config = sampling_config(arguments, model)
    class_labels = labels_of(model, config).tolist()
    model.sample_with(PRECISIONS[arguments.precision], arguments.compile)
    autoencoder = open_autoencoder(model, device)
    ranks = distributed.start(device)
    if ranks.num_ranks > 1 and target.kind != "folder":
        raise ValueError(f"output must be a directory for several processes, got {target.path}")
    strips = [] if arguments.strips is None else [arguments.strips]
    if ranks.is_first:
        claim_files(strips, arguments.overwrite)
        claim(target, arguments.overwrite)
    distributed.barrier()
    batches = sample(model, autoencoder, config, ranks.rank, ranks.num_ranks)
    title = f"{arguments.checkpoint}\n{config.summary(model)}"
    names = shown_names(model.config)
    with Bar("sample", -(-config.num_images // ranks.num_ranks), "images") as bar:
        for done in write_samples(target, batches, class_labels, names, title):
            bar.update(done)
    distributed.barrier()
    if ranks.is_first:
        for path in strips:
            picture = draw_strips(model, autoencoder, config, arguments.checkpoint)
            write_result(path, partial(picture.save, format="png"))
        facts = {"scheduler": config.resolved_scheduler(model), "precision": arguments.precision}
        about = {"checkpoint": arguments.checkpoint, "sampling": {**asdict(config), **facts}}
        about["class_names"] = names
        write_about(target, {**about, "class_labels": class_labels})
        say(f"wrote {config.num_images} images to {arguments.output}")


def sampling_config(arguments: SampleArguments, model: RemixDiT) -> SamplingConfig:
    """Return how to sample, after checking that it fits the model."""
    labels = label_numbers(arguments.class_labels, model.config)
    config = replace(base_config(arguments, SamplingConfig), class_labels=labels)
    config.resolved_scheduler(model)
    return config


def label_numbers(text: str, config: RemixConfig) -> tuple[int, ...]:
    """Return the labels meant by "3,7" or "cat,dog"; digits are always a number."""
    words = filter(None, (part.strip() for part in text.split(",")))
    return tuple(label_number(word, config) for word in words)


def label_number(word: str, config: RemixConfig) -> int:
    """Return the label that a word means for a model."""
    if word.lstrip("-").isdecimal():
        return int(word)
    if word in config.class_names:
        return config.class_names.index(word)
    known = config.class_names
    if has_imagenet_names(config):
        label = imagenet_label(word)
        if label is not None:
            return label
        close = get_close_matches(word, imagenet_names(), 3)
        known = tuple(close) or imagenet_names()
    such = f" (such as {json.dumps(known[:10], ensure_ascii=False)})" if known else ""
    raise ValueError(
        f"class_labels must be numbers or names of the model's {config.network.num_classes} "
        f"classes{such}, got {word!r}"
    )
