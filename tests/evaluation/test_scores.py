"""Scores of two sets of images: named, with errors and floors, and left out with a reason."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from remixdit.data import EncodeConfig, ShardDataset, encode, open_source
from remixdit.evaluation.features import Extractor, read_reference, write_statistics
from remixdit.evaluation.image_sets import ImageBatch, open_images
from remixdit.evaluation.metrics import (
    frechet_distance,
    gaussian,
    inception_score,
    kernel_distance,
    precision_recall,
)
from remixdit.evaluation.scores import (
    FeatureSet,
    collect,
    image_features,
    reference_features,
    scores,
)
from remixdit.progress import finish
from tests.command_line import pixels, write_folder, write_npz
from tests.tiny import COLOURS


@pytest.fixture
def extractor() -> Extractor:
    return COLOURS


def features(count: int, seed: int = 0, size: int = 6) -> FeatureSet:
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(count, size, generator=generator)
    return FeatureSet(pool, 3 * pool, pool[:, :4])


def test_scores_are_those_of_the_metrics():
    real, fake = features(120, 1), features(50, 2)
    found = scores(real, fake, "inception")
    distance = frechet_distance(gaussian(real.pool), gaussian(fake.pool))
    assert found["FID"]["value"] == pytest.approx(distance)
    assert found["KID"]["value"] == pytest.approx(kernel_distance(real.pool, fake.pool).value)
    spatial = frechet_distance(gaussian(real.spatial), gaussian(fake.spatial))
    assert found["sFID"]["value"] == pytest.approx(spatial)
    assert found["IS"]["value"] == pytest.approx(inception_score(fake.logits).mean)
    assert found["KID"]["standard_error"] > 0
    assert found["FID"]["standard_error"] > 0
    json.dumps(found, allow_nan=False)


def test_precision_and_recall_are_of_equal_numbers():
    real = features(50, 1)
    found = scores(real, features(50, 2), "inception")
    expected = precision_recall(real.pool, features(50, 2).pool)
    assert (found["precision"]["value"], found["recall"]["value"]) == expected
    found = scores(features(200, 1), features(50, 2), "inception")
    assert found["recall"]["num_reference"] == found["recall"]["num_images"] == 50


def test_equal_sets_have_no_distance():
    same = features(64)
    found = scores(same, same, "inception")
    assert found["FID"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["precision"]["value"] == found["recall"]["value"] == 1


def test_names_carry_the_extractor():
    assert set(scores(features(20), features(20), "lite0")) == {
        *("KID-lite0", "FID-lite0", "sFID-lite0", "IS-lite0", "precision-lite0", "recall-lite0"),
    }


def test_the_floor_is_what_real_images_score():
    """Samples from the reference's own distribution score about its floor."""
    found = scores(features(3000, 1), features(500, 2), "inception")
    for name in ("FID", "KID", "precision", "recall", "IS"):
        floor = found[name]["real"]
        assert floor["num_images"] == 500
        margin = 6 * floor["deviation"] + 0.03 + (found[name]["standard_error"] or 0)
        assert found[name]["value"] == pytest.approx(floor["value"], abs=margin), name
    assert found["FID"]["real"]["num_reference"] == 2500
    without = scores(features(60, 1), features(50, 2), "inception")["FID"]["real"]
    assert without["left_out"] == "needs at least 100 images of the reference, got 60"


@pytest.mark.parametrize(
    ("count", "missing"),
    [
        (2, {"KID", "IS", "precision", "recall"}),
        (3, {"IS", "precision", "recall"}),
        (9, {"IS"}),
        (10, set()),
    ],
)
def test_scores_of_too_few_images_say_so(count, missing):
    found = scores(features(40), features(count, 1), "inception")
    for name, score in found.items():
        assert (score["value"] is None) == (name in missing)
        if name in missing:
            assert f"got {count} under test" in score["left_out"]


def test_an_extractor_without_an_output_leaves_its_score_out():
    real, fake = FeatureSet(features(20).pool), FeatureSet(features(20, 1).pool)
    found = scores(real, fake, "dinov2-large")
    assert found["IS-dinov2-large"]["left_out"] == "extractor dinov2-large has no classes"
    assert "no spatial features" in found["sFID-dinov2-large"]["left_out"]


def test_statistics_alone_give_the_frechet_distances_alone(tmp_path):
    real, fake = features(50, 1), features(40, 2)
    write_statistics(tmp_path / "s.npz", gaussian(real.pool), gaussian(real.spatial))
    found = scores(None, fake, "inception", statistics=read_reference(tmp_path / "s.npz"))
    whole = scores(real, fake, "inception")
    for name in ("FID", "sFID", "IS"):
        assert found[name]["value"] == pytest.approx(whole[name]["value"])
    for name in ("KID", "precision", "recall"):
        assert "holds statistics only" in found[name]["left_out"]
    assert found["FID"]["num_reference"] is None


# images


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
