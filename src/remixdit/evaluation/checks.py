"""Do samples show the requested class, and are they copies of the training images?

Both look at the features that the scores are made of. What cannot be told is left out, as a score
is.

Shapes: n images under test, R real ones, F features.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from remixdit.evaluation.image_sets import ImageSet
from remixdit.evaluation.left_out import LeftOut, measured
from remixdit.evaluation.metrics import (
    LinearProbe,
    fit_linear_probe,
    memorisation,
    nearest_neighbours,
)
from remixdit.model.match import are_numbers
from remixdit.seeds import generator_for

__all__ = ["conditional_accuracy", "copies", "matched_labels"]

MAX_PROBE_IMAGES = 10_000  # more add little, and L-BFGS looks at all of them in every step
TEST_SHARE = 4  # one in four labelled real images tests the probe
NUM_CLOSEST = 5


def matched_labels(fake: ImageSet, real: ImageSet) -> np.ndarray:
    """Return the labels (n,) of images under test as the reference numbers them.

    Classes are matched by name where both have names, and by number where one of them only counts.

    Raises:
        LeftOut: There are no labels, or some that the reference does not have.
    """
    if (fake.class_labels < 0).all():
        raise LeftOut("the images under test have no labels")
    if not real.class_names or (real.class_labels < 0).all():
        raise LeftOut("the images of the reference have no labels")
    if (
        are_numbers(fake.class_names)
        or are_numbers(real.class_names)
        or fake.class_names == real.class_names
    ):
        top = int(fake.class_labels.max())
        if top < len(real.class_names):
            return fake.class_labels
        raise LeftOut(
            f"the reference has {len(real.class_names)} classes, label {top} is under test"
        )
    used = {fake.class_names[label] for label in np.unique(fake.class_labels) if label >= 0}
    if missing := sorted(used - set(real.class_names)):
        raise LeftOut(f"the reference has no class {missing[0]!r}")
    numbers = np.array([*map(index_in(real.class_names), fake.class_names), -1])
    return numbers[fake.class_labels]


def index_in(class_names: tuple[str, ...]) -> Any:
    """Return a function from a name to its number, -1 for a name that is not there."""
    numbers = {name: number for number, name in enumerate(class_names)}
    return lambda name: numbers.get(name, -1)


def conditional_accuracy(
    real: Tensor, real_labels: np.ndarray, fake: Tensor, fake_labels: np.ndarray, seed: int = 0
) -> dict[str, Any]:
    """Return how often a linear probe, fitted to real images, finds the requested class.

    Args:
        real: (R, F) features.
        real_labels: (R,) integers, -1 for none.
        fake: (n, F) features.
        fake_labels: (n,) integers, likewise.
        seed: Seed for dividing the real images into those that fit the probe and those that test
            it. Its accuracy on the latter is what a perfect generator would get.

    Raises:
        LeftOut: Too few images have labels that both sets know.
    """
    fitted, tested = divided(real_labels, seed)
    classes = np.unique(real_labels[fitted])
    known = np.flatnonzero(np.isin(fake_labels, classes))
    tested = tested[np.isin(real_labels[tested], classes)]
    for reason, holds in (
        ("needs at least 2 classes in the reference", len(classes) >= 2),
        ("needs at least 8 labelled images of the reference", (real_labels >= 0).sum() >= 8),
        ("needs images under test of the reference's classes", len(known) > 0),
    ):
        if not holds:
            raise LeftOut(reason)
    rows, labels = torch.from_numpy(fitted), torch.from_numpy(real_labels[fitted])
    probe = fit_linear_probe(real[rows.to(real.device)], labels.to(real.device))
    value = probe_accuracy(probe, fake, fake_labels, known)["value"]
    return {
        "value": value,
        "standard_error": float((value * (1 - value) / len(known)) ** 0.5),
        "error_is": "binomial",
        "num_images": len(known),
        "fitted_to": len(fitted),
        "chance": 1 / len(classes),
        "real": measured(lambda: probe_accuracy(probe, real, real_labels, tested)),
    }


def probe_accuracy(
    probe: LinearProbe,
    features: Tensor,  # (m, F)
    class_labels: np.ndarray,  # (m,)
    chosen: np.ndarray,  # indices of the images to test
) -> dict[str, Any]:
    """Return the accuracy of a probe on some images."""
    if not len(chosen):
        raise LeftOut("too few labelled images of the reference")
    rows = torch.from_numpy(chosen).to(features.device)
    labels = torch.from_numpy(class_labels[chosen]).to(features.device)
    return {"value": probe.accuracy(features[rows], labels), "num_images": len(chosen)}


def divided(real_labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide the images that have a label (R,) into those that fit a probe and those that test it.

    Returns:
        Their places, rising: at most MAX_PROBE_IMAGES to fit, and one in TEST_SHARE to test.
    """
    labelled = np.flatnonzero(real_labels >= 0)
    order = torch.randperm(len(labelled), generator=generator_for(seed, "probe")).numpy()
    first = len(order) // TEST_SHARE
    tested, fitted = labelled[order[:first]], labelled[order[first:][:MAX_PROBE_IMAGES]]
    return np.sort(fitted), np.sort(tested)


def copies(fake: Tensor, train: Tensor, held_out: Tensor, seed: int = 0) -> dict[str, Any]:
    """Return whether images lie nearer to the training images than to held-out ones.

    Args:
        fake: (n, F) features of the images under test.
        train: (R, F) features of the images that the model was trained on.
        held_out: (R', F) features of images of the same kind that it was not trained on.
        seed: Seed for thinning the sets to equal sizes.
    """
    found = memorisation(fake, train, held_out, seed=seed)
    distances, nearest = nearest_neighbours(fake, train)
    closest = distances.argsort()[:NUM_CLOSEST].tolist()
    return {
        "value": found.fraction_nearer_train.value,
        "standard_error": found.fraction_nearer_train.standard_error,
        "error_is": "by chance, were nothing memorised",
        "expected": 0.5,
        "median_distance_to_train": found.median_to_train,
        "median_distance_to_held_out": found.median_to_held_out,
        "num_images": len(fake),
        "num_train": min(len(train), len(held_out)),
        "closest": [
            {
                "image": place,
                "train_image": int(nearest[place]),
                "distance": float(distances[place]),
            }
            for place in closest
        ],
    }
