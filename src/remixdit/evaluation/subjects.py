"""Images under test: samples of a model, or images on disk."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from remixdit.data.autoencoder import Autoencoder, LatentAutoencoder, Pixels, load_autoencoder
from remixdit.evaluation.image_sets import ImageBatch, ImageSet, open_images
from remixdit.images.source import UNLABELLED, numbered_class_names
from remixdit.model.model import RemixDiT
from remixdit.sampling.files import ABOUT_FILE
from remixdit.sampling.sampler import SamplingConfig, labels_of, sample_latents

__all__ = ["Subject", "files_subject", "model_subject"]


class Subject(NamedTuple):
    """Images under test."""

    images: ImageSet
    facts: dict[str, Any]
    """The origin of the images and how they were sampled, as JSON values."""


def model_subject(
    checkpoint: str, model: RemixDiT, sampling: SamplingConfig, facts: dict[str, Any]
) -> Subject:
    """Return the samples of a model, which are drawn when they are read.

    Args:
        checkpoint: The path or name that the user gave.
        model: The model, on its device and in its precision.
        sampling: How to draw them; image i depends on (seed, i) alone.
        facts: Further facts for the result, such as the precision.
    """
    scheduler = sampling.resolved_scheduler(model)
    labels = labels_of(model, sampling).numpy()
    autoencoder = load_autoencoder(model.config.autoencoder, model.device)
    size, channels = image_shape(model, autoencoder)
    network = model.config.network

    def read(parts: Sequence[np.ndarray]) -> Iterator[ImageBatch]:
        for rows in parts:
            yield ImageBatch(rows, drawn_images(model, autoencoder, sampling, rows))

    names = model.config.class_names or tuple(map(str, range(network.num_classes)))
    images = ImageSet(
        name=str(checkpoint),
        image_size=size,
        channels=channels,
        class_labels=labels if network.num_classes else np.full_like(labels, UNLABELLED),
        class_names=names,
        fingerprint="",
        read=read,
        batch_size=sampling.batch_size,
    )
    about = {**asdict(sampling), "scheduler": scheduler, "labels": label_scheme(model, sampling)}
    del about["num_images"], about["precompute"]
    return Subject(images, {"checkpoint": str(checkpoint), "sampling": {**about, **facts}})


def image_shape(model: RemixDiT, autoencoder: Autoencoder) -> tuple[int, int]:
    """Return the size and the number of channels of decoded samples."""
    size, channels = model.config.network.input_size, model.config.network.in_channels
    if isinstance(autoencoder, LatentAutoencoder):
        return size * autoencoder.downsampling, int(autoencoder.config["out_channels"])
    if isinstance(autoencoder, Pixels) and channels not in (1, 3):
        raise ValueError(
            f"autoencoder must be known for a model of {channels} channels, got none: import it "
            "again with --autoencoder"
        )
    return size, channels


def drawn_images(
    model: RemixDiT, autoencoder: Autoencoder, sampling: SamplingConfig, rows: np.ndarray
) -> np.ndarray:
    """Return the samples (B, H, W, C) uint8 of the given indices."""
    latents = sample_latents(model, sampling, rows.tolist())
    if not latents.isfinite().all():
        raise ArithmeticError("samples must be finite, got nan or inf: the model has diverged")
    return autoencoder.decode(latents).cpu().numpy()


def label_scheme(model: RemixDiT, sampling: SamplingConfig) -> str:
    """Return in words which labels the images are drawn for."""
    classes = model.config.network.num_classes
    if not classes:
        return "none: the model is unconditional"
    if sampling.class_labels:
        return f"balanced: image i takes label i mod {len(sampling.class_labels)} of class_labels"
    return f"balanced: image i takes label i mod {classes}, all classes in turn"


def files_subject(
    path: str,
    num_images: int = 0,
    image_size: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Subject:
    """Return images on disk: an .npz, a folder, shards or a collection.

    Args:
        path: Their place; a folder that `remixdit sample` wrote says how they were sampled.
        num_images: Number of images, chosen by `seed`; 0 for all.
        image_size: Size after scaling and cropping; by default they must be of one size.
        seed: Seed for the choice of images.
        device: Device on which the autoencoder decodes latents.
    """
    images = open_images(path, image_size=image_size, device=device)
    facts: dict[str, Any] = {"path": str(path), "sampling": None}
    about_file = Path(path) / ABOUT_FILE
    if about_file.is_file():
        about = json.loads(about_file.read_text("utf-8"))
        facts |= {"checkpoint": about["checkpoint"], "sampling": about["sampling"]}
        labels = np.array(about["class_labels"], np.int64)
        if len(labels) != len(images):
            raise ValueError(
                f"{about_file} must tell of the {len(images)} images beside it, got {len(labels)}"
            )
        names = tuple(about.get("class_names") or numbered_class_names(labels))
        images = replace(images, class_labels=labels, class_names=names)
    if num_images > len(images):
        raise ValueError(f"num_images must be at most {len(images)} for {path}, got {num_images}")
    return Subject(images.drawn(num_images, seed), facts)
