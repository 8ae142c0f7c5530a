"""Held-out images as a model sees them."""

import numpy as np
import pytest
import torch
from PIL import Image

from remixdit.data import EncodeConfig, ShardDataset, encode, open_source
from remixdit.evaluation.held_out import held_out, model_labels, open_held_out
from remixdit.model.config import RemixConfig
from remixdit.model.match import Side
from remixdit.progress import finish
from tests.command_line import write_folder
from tests.tiny import tiny_config

CLASSES = RemixConfig(network=tiny_config(), class_names=("cat", "dog", "elk"))
NUMBERS = RemixConfig(network=tiny_config(), class_names=("0", "1", "2"))
NAMELESS = RemixConfig(network=tiny_config())
PIXELS = RemixConfig(
    network=tiny_config(input_size=16, in_channels=3), class_names=("cat", "dog", "elk")
)


def side(names: tuple[str, ...]) -> Side:
    """What data of these classes state."""
    pixels = {"name": "none"}
    return Side(name="here", num_classes=len(names), class_names=names, autoencoder=pixels)


@pytest.fixture
def photos(tmp_path):
    """Cats and elks, as a folder and as shards."""
    folder = write_folder(tmp_path / "photos", cat=4, elk=5)
    finish(encode(open_source(folder), tmp_path / "shards", EncodeConfig(image_size=16)))
    return folder


def test_shards_and_pictures_give_the_same_images(photos, tmp_path):
    pictures, facts = open_held_out(str(photos), PIXELS, 6)
    shards, facts_of_shards = open_held_out(str(tmp_path / "shards"), PIXELS, 6)
    assert torch.equal(pictures.latents, shards.latents)
    assert torch.equal(pictures.class_labels, shards.class_labels)
    assert facts == {**facts_of_shards, "path": str(photos)}


def test_held_out_images_are_pixels_from_minus_1_to_1(photos):
    held, _ = open_held_out(str(photos), PIXELS)
    assert held.class_labels.tolist() == [0] * 4 + [2] * 5  # cat and elk of cat, dog and elk
    with Image.open(photos / "cat" / "0.png") as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(held.latents[0], pixels)


def test_images_are_drawn_by_seed(photos):
    few, again, others = (open_held_out(str(photos), PIXELS, 4, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(few.latents, again.latents)
    assert not torch.equal(few.latents, others.latents)


def test_a_study_measures_the_first_images(photos, tmp_path):
    dataset = ShardDataset(tmp_path / "shards")
    whole, _ = open_held_out(str(tmp_path / "shards"), PIXELS)
    assert torch.equal(held_out(dataset, 3, PIXELS).latents, whole.latents[:3])
    with pytest.raises(ValueError, match=r"num_images must be in 1\.\.9, got 10"):
        held_out(dataset, 10, PIXELS)


def test_a_study_numbers_held_out_classes_as_its_model_does(photos, tmp_path):
    held = held_out(ShardDataset(tmp_path / "shards"), 9, PIXELS)
    assert held.class_labels.tolist() == [0] * 4 + [2] * 5  # cat and elk of cat, dog and elk


@pytest.mark.parametrize(
    ("config", "names", "labels", "expected"),
    [
        (CLASSES, ("cat", "dog", "elk"), [0, 1, 2, -1], [0, 1, 2, 3]),
        (CLASSES, ("elk", "cat"), [0, 1, -1], [2, 0, 3]),
        (CLASSES, (), [-1, -1], [3, 3]),  # not labelled
        (CLASSES, ("0", "1", "2"), [2, 0], [2, 0]),  # only numbered
        (NUMBERS, ("cat", "dog", "elk"), [2, 0], [2, 0]),
        (NUMBERS, ("1",), [0], [1]),
        (NAMELESS, ("cat", "dog", "elk"), [2, -1], [2, 3]),
    ],
)
def test_labels_are_matched_by_name_or_by_number(config, names, labels, expected):
    assert model_labels(torch.tensor(labels), side(names), config).tolist() == expected


def test_a_model_without_classes_takes_any_labels():
    config = RemixConfig(network=tiny_config(num_classes=0))
    assert model_labels(torch.tensor([0, 1]), side(("cat", "dog")), config).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("config", "names", "message"),
    [
        (CLASSES, ("cat", "cow"), "classes of here must be among those of the model, got 'cow'"),
        (CLASSES, ("0", "1"), "classes of here must be the 3 of the model, got 2"),
        (NAMELESS, ("cat",), "classes of here must be the 3 of the model, got 1"),
    ],
)
def test_classes_of_another_model_are_refused(config, names, message):
    with pytest.raises(ValueError, match=message):
        model_labels(torch.tensor([0]), side(names), config)
