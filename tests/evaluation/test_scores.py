"""Scores of two sets of images: named, with errors and floors, and left out with a reason."""

import json

import pytest
import torch

from remixdit.evaluation.feature_sets import FeatureSet
from remixdit.evaluation.features import read_reference, write_statistics
from remixdit.evaluation.metrics import (
    frechet_distance,
    gaussian,
    inception_score,
    kernel_distance,
    precision_recall,
)
from remixdit.evaluation.scores import scores


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
