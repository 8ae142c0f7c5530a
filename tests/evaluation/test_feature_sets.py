"""Features of images: of every layout, over all processes, without those that cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image

from remixdit.data import EncodeConfig, ShardDataset, encode, open_source
from remixdit.evaluation.feature_sets import collect, image_features, reference_features
from remixdit.evaluation.features import Extractor
from remixdit.evaluation.image_sets import ImageBatch, open_images
from remixdit.progress import Progress, finish
from tests.command_line import pixels, write_folder, write_npz
from tests.tiny import COLOURS


@pytest.fixture
def extractor() -> Extractor:
    return COLOURS


def test_every_layout_gives_the_same_images(tmp_path, extractor):
    images = pixels(9)
    np.savez(tmp_path / "stream.npz", arr_0=images)
    (tmp_path / "folder").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{index}.png")
    list(encode(open_source(tmp_path / "folder"), tmp_path / "shards", EncodeConfig(image_size=16)))
    expected = image_features([images], extractor)
    for name in ("stream.npz", "folder", "shards"):
        found = reference_features(open_images(tmp_path / name), extractor)
        torch.testing.assert_close(found.pool, expected.pool)
    shards = reference_features(ShardDataset(tmp_path / "shards"), extractor)
    torch.testing.assert_close(shards.pool, expected.pool)


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_drawn_images_are_those_of_their_rows(kind, tmp_path):
    write_npz(tmp_path / "npz.npz", 700)
    write_folder(tmp_path / "folder", cat=20, dog=15)
    images = open_images(tmp_path / ("npz.npz" if kind == "npz" else "folder"))
    whole = np.concatenate([batch.images for batch in images.batches()])
    drawn = images.drawn(30, seed=1)
    parts = list(drawn.batches())
    found = np.concatenate([part.images for part in parts])
    assert np.concatenate([part.rows for part in parts]).tolist() == list(range(30))
    chosen = [int((whole == image).all((1, 2, 3)).argmax()) for image in found]
    assert chosen == sorted(set(chosen))
    assert drawn.class_labels.tolist() == images.class_labels[chosen].tolist()
    assert images.drawn(10_000) is images


def test_processes_share_the_images_and_miss_none(tmp_path, extractor):
    images = open_images(write_npz(tmp_path / "a.npz", 300))
    rows = [b.rows for rank in range(3) for b in images.batches(rank, 3)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(300))


def test_unreadable_images_are_left_out(tmp_path, extractor):
    folder = write_folder(tmp_path / "photos", cat=3, dog=3)
    (folder / "cat" / "1.png").write_bytes(b"no image")
    images = open_images(folder)
    found, rows = finish(collect(images.batches(), len(images), extractor))
    assert rows.tolist() == [0, 2, 3, 4, 5]
    assert len(found.pool) == 5


def test_collected_features_stand_in_the_order_of_their_rows(extractor):
    images = pixels(6)
    batches = [ImageBatch(np.array([4, 5]), images[4:]), ImageBatch(np.arange(4), images[:4])]
    found, _ = finish(collect(iter(batches), 6, extractor))
    torch.testing.assert_close(found.pool, image_features([images], extractor).pool)


def test_images_are_cut_and_turned_grey_on_request(tmp_path):
    images = open_images(write_npz(tmp_path / "a.npz", 5), image_size=8, channels=1)
    assert next(images.batches()).images.shape == (5, 8, 8, 1)
    images = open_images(write_folder(tmp_path / "f", a=2, b=2), image_size=8, channels=1)
    assert next(images.batches()).images.shape == (4, 8, 8, 1)


def test_images_of_several_sizes_are_refused_until_a_size_is_named(tmp_path):
    folder = write_folder(tmp_path / "photos", cat=2, dog=2)
    Image.new("RGB", (20, 20)).save(folder / "dog" / "9.png")
    with pytest.raises(ValueError, match="image_size must be given for images of several sizes"):
        list(open_images(folder).batches())
    assert sum(len(b.rows) for b in open_images(folder, image_size=12).batches()) == 5
    Image.new("RGB", (20, 30)).save(folder / "cat" / "0.png")
    with pytest.raises(ValueError, match="that are not square, got 20 x 30"):
        open_images(folder)


def test_shards_of_another_size_are_refused(tmp_path):
    source = open_source(write_npz(tmp_path / "a.npz", 5))
    list(encode(source, tmp_path / "shards", EncodeConfig(image_size=16)))
    with pytest.raises(ValueError, match=r"image_size of .* must be 32, .* got 16"):
        open_images(tmp_path / "shards", image_size=32)


def test_progress_is_that_of_this_process(tmp_path, extractor):
    images = open_images(write_npz(tmp_path / "a.npz", 100))
    work = collect(images.batches(1, 2), 100, extractor, stage="samples", num_ranks=2)
    assert next(work) == Progress("samples", 0, 50)
    assert next(work) == Progress("samples", 36, 50)
