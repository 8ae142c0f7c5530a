"""What do the metrics say of real images, and of images that are made worse step by step?

    python benchmarks/metrics_floor.py IMAGES --output floor.json

IMAGES is anything that `remixdit encode` reads, at least 8,000 images of one size with labels
(docs/metrics.md used CIFAR-10's test set). Prints Markdown tables; about 35,000 images pass
through the extractor.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from remixdit.data import open_source
from remixdit.evaluation.features import Extractor, load_extractor, metric_name
from remixdit.evaluation.metrics import (
    Estimate,
    bootstrap_frechet,
    fit_linear_probe,
    frechet_distance,
    gaussian,
    inception_score,
    jackknife_frechet,
    kernel_distance,
    memorisation,
    precision_recall,
    real_floor,
)

BATCH_SIZE = 250
Row = dict[str, str | float | int]


def frechet(reference: Tensor, images: Tensor) -> float:
    return frechet_distance(gaussian(reference), gaussian(images))


def extract(extractor: Extractor, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    outputs = [extractor(torch.from_numpy(part)) for part in batches(pixels)]
    logits = [output.logits for output in outputs if output.logits is not None]
    return torch.cat([output.pool for output in outputs]), torch.cat(logits)


def batches(pixels: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(pixels), BATCH_SIZE):
        yield pixels[start : start + BATCH_SIZE]


def blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    kernel = ImageFilter.GaussianBlur(sigma)
    return np.stack([np.asarray(Image.fromarray(image).filter(kernel)) for image in pixels])


def noisy(pixels: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(scale=sigma, size=pixels.shape)
    return (pixels + noise).round().clip(0, 255).astype(np.uint8)


def floors(features: Tensor, sizes: list[int]) -> Iterator[Row]:
    measures: dict[str, Callable[[Tensor, Tensor], float]] = {
        "FID": frechet,
        "KID x 1e3": lambda reference, images: 1e3 * kernel_distance(reference, images).value,
        "precision": lambda reference, images: precision_recall(reference, images).precision,
        "recall": lambda reference, images: precision_recall(reference, images).recall,
    }
    for size in sizes:
        for name, measure in measures.items():
            mean, std = real_floor(features, size, measure, num_reference=size)
            yield {"metric": name, "n": size, "mean of 5": mean, "deviation": std}


def errors(features: Tensor, num_reference: int) -> Iterator[Row]:
    """Compare the errors that one set of images gives with the spread over disjoint sets."""
    reference, others = features[:num_reference], features[num_reference:]
    known = gaussian(reference)
    for size in (500, 1000, 2000):
        parts = others[: len(others) // size * size].view(-1, size, others.shape[1])
        kernels = [kernel_distance(reference, part) for part in parts]
        yield {
            "n": size,
            "sets": len(parts),
            "FID, spread": deviation([frechet_distance(known, gaussian(part)) for part in parts]),
            "jackknife": mean_error([jackknife_frechet(known, part) for part in parts[:3]]),
            "bootstrap": mean_error([bootstrap_frechet(known, part) for part in parts[:3]]),
            "KID x 1e3, spread": 1e3 * deviation([estimate.value for estimate in kernels]),
            "jackknife ": 1e3 * mean_error(kernels),
        }


def deviation(values: list[float]) -> float:
    return float(np.std(values, ddof=1))


def mean_error(estimates: list[Estimate]) -> float:
    return float(np.mean([estimate.standard_error for estimate in estimates]))


def degraded(extractor: Extractor, reference: Tensor, pixels: np.ndarray) -> Iterator[Row]:
    versions: list[tuple[str, Callable[[np.ndarray, float], np.ndarray], list[float]]] = [
        ("blur, sigma in pixels", blurred, [0, 0.5, 1, 2]),
        ("noise, sigma of 255", noisy, [4, 8, 16, 32]),
    ]
    for kind, change, strengths in versions:
        for strength in strengths:
            features, logits = extract(extractor, change(pixels, strength) if strength else pixels)
            yield {"images": kind, "strength": strength, **scores(reference, features, logits)}


def fewer_classes(
    reference: Tensor, images: tuple[Tensor, Tensor], class_labels: Tensor
) -> Iterator[Row]:
    features, logits = images
    for num_classes in (10, 5, 2, 1):
        kept = torch.nonzero(class_labels < num_classes)[:, 0]
        kept = kept[torch.arange(len(features)) % len(kept)]  # the same n, images repeated
        row = scores(reference, features[kept], logits[kept])
        yield {"images": "classes present", "strength": num_classes, **row}


def scores(reference: Tensor, features: Tensor, logits: Tensor) -> Row:
    precision, recall = precision_recall(reference, features)
    return {
        "FID": frechet(reference, features),
        "KID x 1e3": 1e3 * kernel_distance(reference, features).value,
        "IS": inception_score(logits).mean,
        "precision": precision,
        "recall": recall,
    }


def probes(features: Tensor, class_labels: Tensor) -> Iterator[Row]:
    half = len(features) // 2
    probe = fit_linear_probe(features[:half], class_labels[:half])
    accuracy = probe.accuracy(features[half:], class_labels[half:])
    yield {"check": f"linear probe, {half} to fit, {half} to test: accuracy", "value": accuracy}
    samples, train, held_out = features[: half // 2], features[half // 2 : half], features[half:]
    fair = memorisation(samples, train, held_out).fraction_nearer_train
    yield {"check": "memorisation, new real images: nearer to train", "value": fair.value}
    yield {"check": "its standard error", "value": fair.standard_error}
    copies = memorisation(train, train, held_out).fraction_nearer_train
    yield {"check": "memorisation, copies of train: nearer to train", "value": copies.value}


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def costs(extractor: Extractor, pixels: np.ndarray, features: Tensor) -> Iterator[Row]:
    half = len(features) // 2
    first, second = features[:half], features[half:]
    batch = torch.from_numpy(pixels[:BATCH_SIZE])
    seconds = min(timed(lambda: extractor(batch)) for _ in range(3))
    yield {"cost": f"{extractor.name}, images per second", "value": BATCH_SIZE / seconds}
    for name, measure in {
        "FID": frechet,
        "KID": kernel_distance,
        "precision, recall": precision_recall,
    }.items():
        seconds = timed(lambda measure=measure: measure(first, second))
        yield {"cost": f"{name} of {half} against {half}, seconds", "value": seconds}


def markdown(rows: list[Row]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images")
    parser.add_argument("--extractor", default="lite0")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    extractor = load_extractor(arguments.extractor)
    source = open_source(arguments.images)
    largest = max(arguments.sizes)
    order = np.random.default_rng(0).permutation(len(source))[: max(10_000, 2 * largest)]
    pixels = np.stack([np.asarray(source.load(int(index))[0].convert("RGB")) for index in order])
    class_labels = torch.from_numpy(source.class_labels[order])
    features, logits = extract(extractor, pixels)
    reference, rest = features[:largest], slice(largest, 2 * largest)
    tables = {
        "floor": list(floors(features, arguments.sizes)),
        "errors": list(errors(features, largest)),
        "degraded": list(degraded(extractor, reference, pixels[rest])),
        "classes": list(
            fewer_classes(reference, (features[rest], logits[rest]), class_labels[rest])
        ),
        "checks": list(probes(features[: 2 * largest], class_labels[: 2 * largest])),
        "costs": list(costs(extractor, pixels, features[: 2 * largest])),
    }
    facts = {**extractor.facts(), "torch": torch.__version__, "machine": platform.machine()}
    facts |= {"threads": torch.get_num_threads(), "name": metric_name("FID", extractor.name)}
    arguments.output.write_text(json.dumps({"facts": facts, **tables}, indent=1))
    print("\n".join(f"## {name}\n\n{markdown(rows)}" for name, rows in tables.items()))


if __name__ == "__main__":
    main()
