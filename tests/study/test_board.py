"""The leaderboard: equal seconds, variants that go first, differences paired image by image."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from remixdit.data import EncodeConfig, encode, open_source
from remixdit.evaluation.metrics import kernel_distance, kernel_shifts
from remixdit.model.loading import load_model
from remixdit.study.cell import run_cell
from remixdit.study.config import StudyConfig
from remixdit.study.paired import paired_kernels
from remixdit.study.runs import Cell, first_parts, goals_of, parts_of
from remixdit.study.speeds import measure_speeds, missing_speeds, ratios_of, read_speeds
from remixdit.study.study import study
from remixdit.study.variants import STUDIES, VARIANTS, variant
from tests.command_line import save_model, write_npz

EVEN = dict.fromkeys(VARIANTS, 1.0)  # all steps take as long
RATIOS = {"stratified": 1.0, "remix": 1.25, "rank-16": 0.8, "independent-shared": 1.6}


def config_for(directory, **changes) -> StudyConfig:
    """Return a leaderboard of seconds."""
    settings = {
        "name": "leaderboard",
        "data": str(directory / "train"),
        "held_out": str(directory / "held"),
        "init_from": str(directory / "plain"),
        "output_dir": directory / "board",
        "seeds": 1,
        "steps": 8,
        "batch_size": 8,
        "num_bases": 2,
        "num_experts": 4,
        "num_held_out": 4,
    }
    return StudyConfig(**{**settings, **changes})


def test_equal_seconds_are_fewer_steps_for_a_dearer_step(tmp_path):
    config = config_for(tmp_path, steps=1000)
    assert goals_of(config, "remix", RATIOS) == {"images": 1000, "seconds": 800}
    assert goals_of(config, "rank-16", RATIOS) == {"images": 1000, "seconds": 1250}
    assert goals_of(config, "remix@0.5", RATIOS) == goals_of(config, "remix", RATIOS)


def test_what_goes_first_is_paid_for_from_the_same_budget(tmp_path):
    config = config_for(tmp_path, steps=1000)
    trained = {**RATIOS, "rank-16-trained": 0.8, "independent-learned": 2.0}
    goals = goals_of(config, "rank-16-trained", trained)
    assert goals == {"images": 500, "seconds": 625}
    # Three quarters of the seconds are 469 steps of 1.6, and the rest 125 of 2.0.
    assert goals_of(config, "independent-learned", trained) == {"images": 531, "seconds": 125}
    images = goals_of(replace(config, budget="images"), "independent-learned", {})
    assert images == {"images": 250}
    with pytest.raises(ValueError, match="steps must leave at least 1 after the first variant"):
        goals_of(
            replace(config, steps=4), "independent-learned", {**trained, "independent-learned": 9}
        )


def test_a_budget_in_seconds_needs_a_constant_learning_rate(tmp_path):
    with pytest.raises(ValueError, match="lr_schedule must be constant for a budget in seconds"):
        config_for(tmp_path, lr_schedule="cosine")
    assert not config_for(tmp_path, lr_schedule="cosine", budget="images").is_timed
    with pytest.raises(ValueError, match="budget must be images, seconds or auto, got 'time'"):
        config_for(tmp_path, budget="time")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Return a directory with shards to train on, others to measure on, and a plain DiT."""
    directory = tmp_path_factory.mktemp("given")
    save_model(directory / "plain", 0, num_experts=1)
    for name, count in (("train", 24), ("held", 20)):
        images = write_npz(directory / f"{name}.npz", count)
        list(encode(open_source(str(images)), directory / name, EncodeConfig(image_size=16)))
    return directory


def test_both_goals_of_a_run_without_an_end_are_one_run(given):
    config, start = config_for(given), load_model(given / "plain")
    for name, same in (("remix", True), ("published", False)):
        cell = Cell(name, 0)
        goals = ("images", "seconds")
        images, seconds = (parts_of(config, cell, start, goal, EVEN)[0] for goal in goals)
        assert (images.output_dir == seconds.output_dir) is same
    for name in STUDIES["leaderboard"][1:]:
        for part in first_parts(config, Cell(name, 0), start, EVEN):
            assert part.mixture.num_bases == 1  # what goes first is plain


@pytest.mark.parametrize("name", [n for n in VARIANTS if variant(n).first])
def test_a_cell_starts_from_what_went_first(name, given):
    config, start, cell = (
        config_for(given, steps=80, num_experts=8),
        load_model(given / "plain"),
        Cell(name, 0),
    )
    first = first_parts(config, cell, start, EVEN)
    own = parts_of(config, cell, start, "images", EVEN)[0]
    assert [own.init_from, *own.further_bases] == [str(part.output_dir) for part in first]
    images = sum(part.steps * part.batch_size for part in first)
    assert images == 80 * 8 * variant(name).first_share
    faster = first_parts(config, Cell(f"{name}@2", 0), start, EVEN)
    rates = [part.optimizer.learning_rate for part in (*first[:1], *faster)]
    assert rates[1:] == [2 * rates[0]] * len(faster)


def test_a_leaderboard_trains_every_kind_of_variant_for_equal_seconds(given, tmp_path):
    names = "start,stratified,independent-merged,rank-16-trained,remix"
    config = config_for(given, variants=names, output_dir=tmp_path / "board", batch_size=16)
    assert next(study(config)).done == 0
    measure_speeds(config, missing_speeds(config), 1)
    ratios = ratios_of(read_speeds(config))
    for name in names.split(","):  # each has a process of its own in a study
        run_cell(config, Cell(name, 0), ratios, 1)
    assert [progress.done for progress in study(config)] == [len(names.split(","))]
    assert ratios["stratified"] == 1
    assert not missing_speeds(config)
    cells = json.loads((config.output_dir / "results.json").read_text())["cells"]
    assert [cell["variant"] for cell in cells] == names.split(",")
    for cell in cells:
        if cell["variant"] == "start":
            continue
        goals = goals_of(config, cell["variant"], ratios)
        assert cell["equal_seconds"]["steps"] == goals["seconds"]
        assert np.isfinite(cell["equal_seconds"]["loss"])
        budget = config.steps * read_speeds(config)["stratified"]["median_ms"] / 1000
        step = budget / config.steps * max(ratios.values())
        assert cell["equal_seconds"]["seconds"] == pytest.approx(budget, abs=step)
        if goals["images"] == goals["seconds"]:
            assert cell["equal_seconds"]["loss"] == cell["loss"]
    assert cells[2]["num_experts"] == 8  # before they were merged into one
    header = (config.output_dir / "board.md").read_text().splitlines()[0]
    assert "% of stratified" in header
    assert "least noisy quarter, %" in header
    assert (config.output_dir / "board.png").read_bytes().startswith(b"\x89PNG")
    assert "At equal time" in (config.output_dir / "report.html").read_text()


def test_shifts_of_the_kernel_distance_are_what_leaving_an_image_out_changes():
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(n, 5, generator=generator) for n in (9, 7))
    found = kernel_shifts(real, fake)
    assert found.value == kernel_distance(real, fake).value
    left_out = [
        kernel_distance(real, torch.cat([fake[:i], fake[i + 1 :]])).value for i in range(len(fake))
    ]
    expected = torch.tensor(left_out, dtype=torch.float64)
    torch.testing.assert_close(found.fake_shifts, expected - expected.mean())


def test_the_error_of_a_paired_kernel_distance_is_that_of_the_difference():
    rng = np.random.default_rng(0)
    shifts = {"real": rng.normal(size=50), "fake": rng.normal(size=40)}
    same = paired_kernels({0: 2.0}, {0: shifts}, {0: 1.0}, {0: shifts})
    assert (same.mean, same.reach, same.wins) == (100.0, 0.0, 0)
    other = {"real": shifts["real"], "fake": np.zeros(40)}
    found = paired_kernels({0: 2.0}, {0: shifts}, {0: 1.0}, {0: other})
    assert found.reach == pytest.approx(196 * np.sqrt(39 / 40 * (shifts["fake"] ** 2).sum()))


def test_a_search_needs_held_out_images_that_are_not_measured_on(given):
    config = config_for(given, num_held_out=12, variants="stratified,independent-merged")
    with pytest.raises(ValueError, match="at most half of the 20 images of held_out"):
        next(study(config))
    assert next(study(replace(config, variants="stratified", budget="images"))).total == 1
