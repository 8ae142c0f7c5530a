"""Work is done on the device that is asked for: the meta device, which has no values, shows it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from remixdit.data import EncodeConfig, encode, open_source
from remixdit.evaluation.image_sets import open_images
from remixdit.evaluation.images import ImageConfig, Real, open_train
from remixdit.evaluation.subjects import files_subject
from remixdit.model.loading import load_model
from remixdit.study import cell
from remixdit.study.config import StudyConfig
from remixdit.study.study import keep_start
from remixdit.training import trainer
from remixdit.training.loop import train
from remixdit.training.presets import train_config
from tests.command_line import save_model
from tests.tiny import COLOURS, save_tiny

META = torch.device("meta")


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Return a directory with pixels and latents of the same pictures, and a plain model."""
    directory = tmp_path_factory.mktemp("given")
    save_tiny(directory / "vae")
    save_model(directory / "plain", 0, num_experts=1)
    images = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)
    np.savez(directory / "images.npz", arr_0=images, arr_1=np.arange(8) % 3)
    source = open_source(str(directory / "images.npz"))
    for name, autoencoder in (("pixels", "none"), ("latents", str(directory / "vae"))):
        list(encode(source, directory / name, EncodeConfig(image_size=16, autoencoder=autoencoder)))
    return directory


def study_of(given: Path, output_dir: Path) -> StudyConfig:
    """Return a study that only measures its start."""
    return StudyConfig(
        name="table2",
        data=str(given / "pixels"),
        held_out=str(given / "pixels"),
        init_from=str(given / "plain"),
        output_dir=output_dir,
        variants="start",
        num_held_out=4,
        num_samples=40,
    )


def test_a_cell_measures_its_model_on_the_device(given, tmp_path, monkeypatch):
    places = []

    def interval_losses(model, *_, **__):
        places.append(model.device)
        raise InterruptedError

    monkeypatch.setattr(cell, "pick_device", {"auto": META}.__getitem__)
    monkeypatch.setattr(cell, "interval_losses", interval_losses)
    config = study_of(given, tmp_path)
    keep_start(config, load_model(config.init_from))
    with pytest.raises(InterruptedError):
        cell.run_cell(config, cell.Cell("start", 0), {}, torch.get_num_threads())
    assert places == [META]


def test_extractor_and_autoencoder_of_a_study_are_on_the_device_of_the_model(
    given, tmp_path, monkeypatch
):
    places = {}

    def open_extractor(name, weights, device):
        places["extractor"] = device
        return replace(COLOURS, device=device)

    def load_autoencoder(spec, device):
        places["autoencoder"] = device

    monkeypatch.setattr(cell, "open_extractor", open_extractor)
    monkeypatch.setattr(cell, "load_autoencoder", load_autoencoder)
    monkeypatch.setattr(cell, "sample", lambda *_: iter(()))
    with pytest.raises(ValueError, match="at least one array"):
        cell.scored(study_of(given, tmp_path), load_model(given / "plain", device="meta"), tmp_path)
    assert places == {"extractor": META, "autoencoder": META}


def test_reference_and_training_images_and_images_under_test_are_decoded_on_the_device(
    given, tmp_path
):
    latents = str(given / "latents")
    config = replace(study_of(given, tmp_path), held_out=latents)
    with pytest.raises(NotImplementedError, match="meta"):
        cell.reference_of(config, replace(COLOURS, device=META))
    fake = open_images(given / "images.npz")
    real = Real(replace(fake, fingerprint="another"), None)
    train_images = open_train(ImageConfig(train=latents), fake, real, 0, META)
    for images in (train_images, files_subject(latents, device=META).images):
        with pytest.raises(NotImplementedError, match="meta"):
            next(images.batches())


def test_grids_during_training_are_decoded_on_the_device_of_the_run(given, tmp_path, monkeypatch):
    asked = []

    def load_autoencoder(spec, device, offline):
        asked.append((spec["name"], device))
        raise InterruptedError

    monkeypatch.setattr(trainer, "load_autoencoder", load_autoencoder)
    config = train_config(
        "tiny", data=given / "pixels", output_dir=tmp_path / "run", steps=1, batch_size=20
    )
    config = replace(config, output=replace(config.output, sample_every=1, tensorboard=False))
    with pytest.raises(InterruptedError):
        list(train(config))
    assert asked == [("none", torch.device("cpu"))]
