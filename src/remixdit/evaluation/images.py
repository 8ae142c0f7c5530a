"""Images of a model, or on disk, against real ones: all scores and their conditions.

Samples go straight through the extractor; only features are kept. Several processes share all
images batch by batch, so the scores do not depend on how many there are, and the first one has
the result.
"""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch

from remixdit.distributed.ranks import Ranks
from remixdit.evaluation.checks import conditional_accuracy, copies, matched_labels
from remixdit.evaluation.feature_sets import FeatureSet, collect
from remixdit.evaluation.features import Extractor, Reference, load_extractor, read_reference
from remixdit.evaluation.image_sets import ImageSet, check_npz, npz_images, open_images
from remixdit.evaluation.left_out import LeftOut, measured
from remixdit.evaluation.scores import scores
from remixdit.evaluation.subjects import Subject
from remixdit.images.npy import npz_names
from remixdit.machine import machine
from remixdit.progress import Progress

__all__ = ["ImageConfig", "evaluate_images", "open_extractor"]


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How images are compared with real ones."""

    reference: str = ""
    """Real images (shards, a folder, Parquet, npz, tar, a name), or an .npz of their statistics."""
    split: str | None = None
    """Name of the split of the reference, e.g. test."""
    train: str | None = None
    """Training images of the model, to measure whether samples are copies of them."""
    train_split: str | None = None
    """Name of the split of the training images, e.g. train."""
    extractor: str = "lite0"
    """Feature extractor: lite0 (works offline), inception (that of FID) or dinov2."""
    extractor_weights: str | None = None
    """Weights: a file or `download` for inception, a Hub id or directory for dinov2."""
    reference_images: int = 50_000
    """Maximum number of real images, chosen by the seed if there are more; 0 for all."""
    real_floor: bool = True
    """Score real images against other real images too, as a floor of each score."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.reference_images < 0 or self.reference_images == 1:
            raise ValueError(
                f"reference_images must be 0 or at least 2, got {self.reference_images}"
            )
        if self.train_split and not self.train:
            raise ValueError(f"train_split must come with train, got {self.train_split!r} alone")


Sets = Mapping[str, ImageSet | None]  # "reference", "train" and "samples"
Found = dict[str, tuple[FeatureSet, np.ndarray]]  # the features and rows of those that there are


class Real(NamedTuple):
    """Real images, their statistics, or both."""

    images: ImageSet | None
    statistics: Reference | None


def evaluate_images(
    subject: Subject,
    config: ImageConfig,
    device: torch.device,
    ranks: Ranks | None = None,
    seed: int = 0,
) -> Generator[Progress, None, dict[str, Any]]:
    """Score images against real ones.

    Args:
        subject: The images under test.
        config: How they are compared with real ones.
        device: Device of the extractor and the metrics.
        ranks: The place of this process among all.
        seed: Seed for all random choices of the metrics.

    Returns:
        The result as JSON values, complete on the first process and empty on others.
    """
    ranks = ranks or Ranks()
    extractor = open_extractor(config.extractor, config.extractor_weights, device)
    real = open_real(config, subject.images, extractor, seed)
    train = open_train(config, subject.images, real, seed, device)
    if len(subject.images) < 2:
        raise ValueError(f"num_images must be at least 2, got {len(subject.images)}")
    sets = {"reference": real.images, "train": train, "samples": subject.images}
    found = yield from all_extracted(sets, extractor, ranks)
    if not ranks.is_first:
        return {}
    fake, rows = found["samples"]
    tables = yield from measurements(sets, found, real.statistics, extractor, config, seed)
    return {
        "evaluated": {**subject.facts, **image_facts(subject.images, rows)},
        "reference": reference_facts(config, real, found.get("reference")),
        "extractor": extractor.facts(),
        **tables,
        "notes": list(notes(subject, real, extractor, len(fake.pool))),
        "machine": machine(device),
    }


def measurements(
    sets: Sets,
    found: Found,
    statistics: Reference | None,
    extractor: Extractor,
    config: ImageConfig,
    seed: int,
) -> Generator[Progress, None, dict[str, dict[str, Any]]]:
    """Return the scores, and whether samples show the requested class and are copies."""
    yield Progress("scores", 0, 1)
    table = scores(
        found["reference"][0] if "reference" in found else None,
        found["samples"][0],
        extractor.name,
        statistics=statistics,
        seed=seed,
        with_floor=config.real_floor,
    )
    yield Progress("scores", 1, 1)
    yield Progress("checks", 0, 1)
    checks = {
        "conditional_accuracy": measured(lambda: accuracy(sets, found, seed)),
        "memorisation": measured(lambda: memorisation(sets, found, seed)),
    }
    yield Progress("checks", 1, 1)
    return {"scores": table, **checks}


def all_extracted(
    sets: Sets, extractor: Extractor, ranks: Ranks
) -> Generator[Progress, None, Found]:
    """Return the features and rows of each set that there is."""
    found: Found = {}
    for name, images in sets.items():
        if images is not None:
            found[name] = yield from extracted(name, images, extractor, ranks)
    return found


def extracted(
    name: str, images: ImageSet, extractor: Extractor, ranks: Ranks
) -> Generator[Progress, None, tuple[FeatureSet, np.ndarray]]:
    """Return the features of a set, and which of its images they are of."""
    features, rows = yield from collect(
        images.batches(ranks.rank, ranks.num_ranks),
        len(images),
        extractor,
        stage=name,
        num_ranks=ranks.num_ranks,
    )
    return features, rows.cpu().numpy()


def open_extractor(name: str, weights: str | None, device: torch.device) -> Extractor:
    """Load an extractor; missing packages and weights are errors of the request."""
    is_file = weights is not None and Path(weights).is_file()
    by_name = {"dinov2": (weights,), "inception": (None, "download")}.get(name, (None,))
    if not is_file and weights not in by_name:
        raise ValueError(f"extractor_weights must be a file, got {weights}")
    try:
        return load_extractor(name, weights=weights, device=device)
    except ImportError as error:
        raise ValueError(str(error)) from error
    except (UnpicklingError, RuntimeError) as error:  # torch's words for what is no such file
        raise ValueError(
            f"extractor_weights must be weights of extractor {name}, got {weights}"
        ) from error


def open_real(config: ImageConfig, fake: ImageSet, extractor: Extractor, seed: int) -> Real:
    """Open the reference: images, statistics or both."""
    if not config.reference:
        raise ValueError("reference must be given: real images, or an .npz of their statistics")
    path, count = Path(config.reference), config.reference_images
    statistics = statistics_in(path)
    if statistics is None or statistics.pool is None:
        images = open_images(
            path, config.split, fake.image_size, fake.channels, device=extractor.device
        ).drawn(count, seed)
        if len(images) < 2:
            raise ValueError(f"reference must hold at least 2 images, got {len(images)} in {path}")
        return Real(images, None)
    if config.split is not None:
        raise ValueError(f"split must be left out for an .npz, got {config.split!r}")
    fits = len(statistics.pool[0]) == extractor.num_features
    if statistics.image_shape is None:
        if not fits:
            raise ValueError(
                f"reference must hold statistics of the {extractor.num_features} features of "
                f"extractor {extractor.name}, or images, got {len(statistics.pool[0])} in {path}"
            )
        return Real(None, statistics)
    if fits and statistics.image_shape[1:3] != 2 * (fake.image_size,):
        raise ValueError(
            f"reference must be of images of {fake.image_size} pixels, as those under test, got "
            f"{statistics.image_shape[1]} in {path}"
        )
    images = npz_images(statistics, fake.image_size, fake.channels).drawn(count, seed)
    return Real(images, statistics if fits else None)


def statistics_in(path: Path) -> Reference | None:
    """Return the statistics in an .npz; None for any other path."""
    if path.suffix != ".npz" or not path.is_file():
        return None
    check_npz(path)
    return read_reference(path) if "mu" in npz_names(path) else None


def open_train(
    config: ImageConfig, fake: ImageSet, real: Real, seed: int, device: torch.device
) -> ImageSet | None:
    """Open the training images, if they are named."""
    if config.train is None:
        return None
    if real.images is None:
        raise ValueError("train needs a reference of images: the held-out ones, got statistics")
    train = open_images(config.train, config.train_split, fake.image_size, fake.channels, device)
    if train.fingerprint == real.images.fingerprint:
        raise ValueError(f"train must be other images than the reference, got {config.train}")
    return train.drawn(config.reference_images, seed)


def image_facts(images: ImageSet, rows: np.ndarray) -> dict[str, Any]:
    """Return the facts about a set of images whose features were extracted."""
    return {
        "name": images.name,
        "num_images": len(rows),
        "unreadable": len(images) - len(rows),
        "image_size": images.image_size,
        "channels": images.channels,
    }


def reference_facts(
    config: ImageConfig, real: Real, found: tuple[FeatureSet, np.ndarray] | None
) -> dict[str, Any]:
    """Return the facts about the reference."""
    facts: dict[str, Any] = {
        "path": config.reference,
        "split": config.split,
        "statistics": None,
    }
    known = statistics_in(Path(config.reference))
    if known is not None:
        facts["statistics"] = "of the file" if real.statistics else "of another extractor, not used"
    if real.images is not None and found is not None:
        facts |= {**image_facts(real.images, found[1]), "fingerprint": real.images.fingerprint}
    return facts


def accuracy(sets: Sets, found: Found, seed: int) -> dict[str, Any]:
    """Return the conditional accuracy."""
    fake, real = sets["samples"], sets["reference"]
    assert fake is not None
    if real is None:
        raise LeftOut("needs images of the reference")
    labels = matched_labels(fake, real)
    (known, known_rows), (features, rows) = found["reference"], found["samples"]
    return conditional_accuracy(
        known.pool, real.class_labels[known_rows], features.pool, labels[rows], seed
    )


def memorisation(sets: Sets, found: Found, seed: int) -> dict[str, Any]:
    """Return whether samples are copies."""
    if "train" not in found:
        raise LeftOut("needs the training images (--train)")
    fake, train, held_out = (found[name][0].pool for name in ("samples", "train", "reference"))
    result = copies(fake, train, held_out, seed)
    for pair in result["closest"]:
        for field, name in (("image", "samples"), ("train_image", "train")):
            images, rows = sets[name], found[name][1]
            assert images is not None
            pair[field] = int(images.numbers(rows[[pair[field]]])[0])
    return result


def notes(subject: Subject, real: Real, extractor: Extractor, count: int) -> Iterator[str]:
    """Yield remarks for a reader of the scores."""
    if count <= extractor.num_features:
        yield (
            f"{count} images are no more than the {extractor.num_features} features: the Fréchet "
            "distance is mostly its floor, look at the kernel distance"
        )
    for images in (subject.images, real.images):
        if images is not None and images.note:
            yield f"{images.name}: {images.note}"
    if real.images is not None and real.images.fingerprint == subject.images.fingerprint:
        yield "the images under test are the reference itself"
    if real.statistics is not None:
        yield (
            "the file of statistics does not say which extractor made them; published ones are "
            "of FID's own Inception"
        )
