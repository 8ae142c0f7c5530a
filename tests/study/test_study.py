"""Studies: equal budgets, paired statistics, going on after a stop."""

import fcntl
import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from remixdit.data import EncodeConfig, encode, open_source
from remixdit.files import PARTIAL_SUFFIX
from remixdit.model.loading import load_model
from remixdit.model.model import RemixDiT
from remixdit.progress import finish
from remixdit.study.cell import reference_of
from remixdit.study.config import StudyConfig
from remixdit.study.paired import paired
from remixdit.study.report import result_table, those_of
from remixdit.study.runs import Cell, common_run
from remixdit.study.study import cells_of, study
from remixdit.study.variants import (
    STUDIES,
    VARIANTS,
    chosen_variants,
    independent_runs,
    run_config,
    variant,
)
from tests.command_line import refusal, remixdit, write_folder
from tests.processes import environment
from tests.tiny import COLOURS


def shards(directory: Path, count: int, seed: int) -> Path:
    """Encode a few images of 16 pixels in 4 classes."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 255, (count, 16, 16, 3), dtype=np.uint8)
    path = directory / f"{seed}.npz"
    np.savez(path, arr_0=images, arr_1=np.arange(count) % 4)
    for _ in encode(
        open_source(str(path)), directory / f"shards-{seed}", EncodeConfig(image_size=16)
    ):
        pass
    return directory / f"shards-{seed}"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Return the shards to train and to measure on, and a plain DiT to start from."""
    directory = tmp_path_factory.mktemp("given")
    train, held = shards(directory, 32, 0), shards(directory, 20, 1)
    plain = f"--num-bases 1 --num-experts 1 --steps 4 --data {train}"
    remixdit(f"train tiny {plain} --output-dir {directory}/start")
    return train, held, directory / "start"


def config_for(given, output_dir: Path, **changes) -> StudyConfig:
    """Return a study of seconds."""
    train, held, start = given
    settings = {
        "name": "table2",
        "data": str(train),
        "held_out": str(held),
        "init_from": str(start),
        "output_dir": output_dir,
        "variants": "start,continued,remix",
        "seeds": 2,
        "steps": 4,
        "batch_size": 8,
        "num_experts": 4,
        "num_bases": 2,
        "num_held_out": 4,
    }
    return StudyConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    """Return a finished study."""
    config = config_for(given, tmp_path_factory.mktemp("study") / "study", num_samples=40,
                        num_inference_steps=2, seeds=1)  # fmt: skip
    progress = list(study(config))
    assert [p.done for p in progress] == [0, 1, 2, 3]
    return config


def results_of(config: StudyConfig) -> dict[tuple[str, int], dict]:
    """Return the results by variant and seed."""
    cells = json.loads((config.output_dir / "results.json").read_text())["cells"]
    return {(cell["variant"], cell["seed"]): cell for cell in cells}


def test_every_variant_gets_the_same_images_and_nearly_the_same_operations(finished):
    results = results_of(finished)
    assert len(results) == 3
    trained = [cell for cell in results.values() if cell["variant"] != "start"]
    assert {cell["images"] for cell in trained} == {32}
    assert len({cell["network_flops"] for cell in trained}) == 1
    assert results["continued", 0]["mixing_flops"] == 0 < results["remix", 0]["mixing_flops"]


def test_losses_are_those_of_the_intervals_and_scores_have_names(finished):
    for cell in results_of(finished).values():
        assert cell["loss"] == pytest.approx(np.mean(cell["loss_by_interval"]))
        assert "KID-lite0" in cell["scores"]["scores"]
        directory = finished.output_dir / "cells" / cell["variant"] / f"seed-{cell['seed']}"
        with np.load(directory / "losses.npz") as file:
            assert file["losses"].shape == (40, 4)
            assert file["losses"].mean() == pytest.approx(cell["loss"], rel=1e-5)
        with np.load(directory / "samples.npz") as file:
            assert file["images"].shape == (40, 16, 16, 3)


def test_a_finished_study_is_not_run_again_and_a_lost_cell_is(finished):
    path = finished.output_dir / "cells" / "remix" / "seed-0" / "result.json"
    before = json.loads(path.read_text())
    path.unlink()
    assert [p.done for p in study(finished)] == [2, 3]
    after = json.loads(path.read_text())
    for name in ("loss", "loss_by_interval", "half", "coefficients"):
        assert after[name] == before[name]
    assert [p.done for p in study(finished)] == [3]


def test_the_report_is_whole_and_the_table_is_markdown(finished):
    page = (finished.output_dir / "report.html").read_text()
    assert page.count("<img") >= 1
    lines = (finished.output_dir / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["start", "continued", "remix"]


def test_paired_differences_are_those_of_a_paired_t_test():
    ours, theirs = {0: 0.9, 1: 1.1, 2: 1.05}, {0: 1.0, 1: 1.2, 2: 1.3, 7: 5.0}
    ratios = np.array([100 * (ours[s] / theirs[s] - 1) for s in range(3)])
    expected = stats.ttest_1samp(ratios, 0).confidence_interval(0.95)
    found = paired(ours, theirs)
    assert found.mean - found.reach == pytest.approx(expected.low)
    assert found.mean + found.reach == pytest.approx(expected.high)
    assert (found.wins, found.seeds) == (3, 3)
    assert math.isnan(paired({0: 1.0}, {0: 2.0}).reach)
    assert paired({0: 1.0}, {1: 2.0}) is None


def test_a_table_holds_every_variant_and_no_baseline_against_itself():
    cells = [
        {
            "variant": name,
            "seed": seed,
            "loss": loss,
            "loss_by_interval": [loss, loss / 10],
            "half": {"loss": 1.5 * loss},
        }
        for name, loss in (("continued", 2.0), ("remix", 1.0))
        for seed in (0, 1)
    ]
    table = result_table(cells, with_half=True)
    column = table.header.index("half-way, % of continued")
    expected = ["+50.00 ± 0.00 (0/2)", "-25.00 ± 0.00 (2/2)"]
    assert [row[column] for row in table.rows] == expected
    assert "half-way, % of continued" not in result_table(cells).header
    for name in ("% of continued", "intervals alike, %"):
        column = table.header.index(name)
        assert [row[column] for row in table.rows] == ["", "-50.00 ± 0.00 (2/2)"]


def test_baselines_are_found_at_any_learning_rate():
    assert those_of(("a", "b"), ["b@2", "a@0.5", "c", "b@4"]) == ["a@0.5", "b@2", "b@4"]
    assert those_of(("a",), ["a@0.5", "a", "a@2"]) == ["a"]


def test_the_stratified_baseline_has_the_intervals_of_the_default(given, tmp_path):
    from remixdit.model.loading import load_model

    config = config_for(given, tmp_path)
    common = common_run(config, Cell("remix", 0), load_model(config.init_from))
    policies = [
        run_config(variant(name), common).interval_policy
        for name in ("remix", "stratified", "uniform", "stratified-uniform", "published")
    ]
    assert policies == ["loss", "loss", "uniform", "uniform", "uniform"]


@pytest.mark.parametrize("name", STUDIES)
def test_every_variant_of_every_study_is_a_run(name, given, tmp_path):
    from remixdit.model.loading import load_model

    config = config_for(given, tmp_path, name=name, variants="", batch_size=32, num_experts=20)
    start = load_model(config.init_from)
    for cell in cells_of(config):
        common = common_run(config, cell, start)
        run = run_config(variant(cell.variant), common)
        steps = round(4 * variant(cell.variant).share)
        assert (run.steps, run.batch_size, run.seed) == (steps, 32, cell.seed + 1)
        assert run.strata_per_step <= 32


@pytest.mark.parametrize(
    ("name", "steps", "batch_size", "policy"),
    [("independent", 2, 8, "uniform"), ("independent-shared", 16, 1, "loss")],
)
def test_independent_experts_are_plain_trainings_of_equal_cost(
    name, steps, batch_size, policy, given, tmp_path
):
    config = config_for(given, tmp_path, steps=16)
    common = common_run(config, Cell(name, 0), load_model(config.init_from))
    runs = independent_runs(variant(name), run_config(variant(name), common))
    assert len(runs) == 8
    assert {(run.steps, run.batch_size) for run in runs} == {(steps, batch_size)}
    assert {run.interval_policy for run in runs} == {policy}
    assert [run.objective.interval for run in runs] == [f"{n}/8" for n in range(8)]
    assert len({run.output_dir for run in runs}) == 8
    assert {run.mixture.num_bases for run in runs} == {1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "tabel2"}, "study must be one of .*, got 'tabel2'; perhaps table2"),
        ({"variants": "start,remixx"}, "variants must be among .*, got 'remixx'; perhaps remix"),
        (
            {"variants": "start,remixx@2"},
            "variants must be among .*, got 'remixx@2'; perhaps remix",
        ),
        (
            {"variants": "remix@0"},
            "variants must be trained at a learning rate above 0 .*'remix@0'",
        ),
        ({"variants": "remix@two"}, "variants must be trained at .*'remix@two'"),
        ({"variants": "start@2"}, "variants must be trained at .*'start@2'"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"steps": 3}, "steps must be at least 4, got 3"),
        ({"num_samples": 7}, "num_samples must be 0 or at least 40, got 7"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message, given, tmp_path):
    with pytest.raises(ValueError, match=message):
        config_for(given, tmp_path, **changes)


def test_what_a_cell_could_not_do_is_refused_before_anything_is_written(given, tmp_path):
    for changes, message in (
        ({"num_held_out": 21}, "num_held_out must be at most the 20 images"),
        ({"variants": "m10"}, "experts_per_step must be in 0..4, got 10"),
    ):
        with pytest.raises(ValueError, match=message):
            list(study(config_for(given, tmp_path / "study", **changes)))
        assert not (tmp_path / "study").exists()


# A package whose place in sys.modules is None is one that is not installed.
WITHOUT = """
import sys
missing, *words = sys.argv[1:]
sys.modules[missing] = None
from remixdit.cli.main import main
sys.exit(main(words))
"""


@pytest.mark.parametrize(
    ("options", "package", "error"),
    [
        ("--seeds 3", "scipy", "seeds must be 1 without scipy, which computes intervals over them"),
        (
            "--seeds 1 --num-samples 40",
            "efficientnet_lite_pytorch",
            "extractor lite0 needs: pip install 'remixdit[evaluate]'",
        ),
    ],
)
def test_a_missing_package_is_named_before_anything_is_written(
    options, package, error, given, tmp_path
):
    train, held, start = given
    line = f"study table2 --data {train} --held-out {held} --from {start} {options}"
    words = [*line.split(), "--output-dir", str(tmp_path / "study")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, package, *words],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert error in done.stderr.splitlines()[-1]
    assert not (tmp_path / "study").exists()


def test_data_of_other_classes_than_the_start_are_refused_before_anything_is_written(
    given, tmp_path
):
    start = load_model(given[2])
    names = {"class_names": ("ant", "bee", "cow", "dog")}
    RemixDiT(replace(start.config, **names), start.expert(0)).save_pretrained(tmp_path / "start")
    for name, classes in (("data", ("bee", "ant", "elk")), ("held_out", ("bee", "elk"))):
        folder = write_folder(tmp_path / name, **dict.fromkeys(classes, 4))
        finish(
            encode(open_source(folder), tmp_path / f"{name}-shards", EncodeConfig(image_size=16))
        )
        changes = {name: str(tmp_path / f"{name}-shards"), "init_from": str(tmp_path / "start")}
        with pytest.raises(ValueError, match=r"classes of .* --from, got .*'elk'"):
            list(study(config_for(given, tmp_path / "study", **changes)))
    assert not (tmp_path / "study").exists()


def test_other_settings_in_the_same_directory_are_refused(finished):
    with pytest.raises(ValueError, match="steps was 4, now 5"):
        list(study(replace(finished, steps=5)))


def test_nothing_is_removed_from_a_directory_that_holds_no_study(given, tmp_path):
    (tmp_path / f".model{PARTIAL_SUFFIX}").touch()
    (tmp_path / "notes.txt").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="output_dir must be empty or hold a study"):
        next(study(config_for(given, tmp_path, seeds=1)))
    assert sorted(tmp_path.iterdir()) == before


def test_two_studies_cannot_write_to_one_directory(given, tmp_path):
    config = config_for(given, tmp_path / "study", variants="start", seeds=1)
    first = study(config)
    next(first)
    with pytest.raises(ValueError, match=r"one run at a time, got .*study, to which process \d+"):
        next(study(config))
    finish(first)
    (progress,) = study(config)  # nothing is left that keeps others out, or to do
    assert progress.done == 1


def test_a_study_keeps_the_weights_of_the_run_that_it_began_with(given, tmp_path):
    """A run that trains on, and prunes its checkpoints, changes nothing of a study."""
    shutil.copytree(given[2], tmp_path / "run")
    config = config_for(
        given, tmp_path / "study", init_from=str(tmp_path / "run"), variants="start"
    )
    began = load_model(tmp_path / "run")
    list(study(config))
    options = f"--num-bases 1 --num-experts 1 --steps 6 --keep-checkpoints 1 --data {given[0]}"
    remixdit(f"train tiny {options} --output-dir {tmp_path}/run")
    with pytest.raises(
        ValueError,
        match=rf"--from must be the model with which the study in {config.output_dir} began, "
        rf"which is kept as {config.output_dir}/start, got other weights in {tmp_path}/run",
    ):
        list(study(config))
    list(study(replace(config, init_from=str(config.output_dir / "start"))))
    kept = load_model(config.output_dir / "start").state_dict()
    assert all(map(torch.equal, kept.values(), began.state_dict().values()))
    assert common_run(config, Cell("remix", 0), began).init_from == f"{config.output_dir}/start"


def test_the_command_says_what_there_is_and_what_is_wrong(capsys):
    remixdit("study --help")
    listed = capsys.readouterr().out
    assert "table2" in listed
    assert VARIANTS["remix"].summary in listed
    line = "study nothing --data a --held-out b --from c --output-dir d"
    assert refusal(line, capsys).startswith("study must be one of table2")


def test_a_study_has_its_own_variants_unless_told():
    assert chosen_variants("mixed", "") == ("start", "stratified", "remix-all", "remix")
    assert chosen_variants("mixed", "k2, remix@0.5") == ("k2", "remix@0.5")


def test_a_variant_at_another_learning_rate_differs_in_nothing_else(given, tmp_path):
    from remixdit.model.loading import load_model

    config = config_for(given, tmp_path)
    common = common_run(config, Cell("published", 0), load_model(config.init_from))
    quarter, full = (run_config(variant(name), common) for name in ("published@0.25", "published"))
    assert quarter.optimizer.learning_rate == full.optimizer.learning_rate / 4
    assert replace(quarter, optimizer=full.optimizer) == full


def test_kept_features_of_the_reference_are_checked_before_they_are_read(given, tmp_path):
    config = config_for(given, tmp_path)
    path = tmp_path / f"reference-{config.extractor}.npz"
    np.savez(path, pool=np.array([{}]))
    with pytest.raises(ValueError, match="it holds Python objects"):
        reference_of(config, COLOURS)
    np.savez(path, pools=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="must hold features, got pools: remove it"):
        reference_of(config, COLOURS)


def test_a_cell_ends_with_its_study_even_if_that_is_killed(tmp_path):
    """Both processes are real: the cell holds a lock, which is free when it has ended."""
    (tmp_path / "slow.py").write_text(
        "import fcntl, time\n"
        "def cell(config, path, threads):\n"
        "    with open(path, 'w') as file:\n"
        "        fcntl.flock(file, fcntl.LOCK_EX)\n"
        "        print('begun', flush=True)\n"
        "        time.sleep(600)\n"
    )
    code = (
        "import sys, types, slow\n"
        "from remixdit.study.study import in_a_process\n"
        "if __name__ == '__main__':\n"
        "    in_a_process(types.SimpleNamespace(workers=1), slow.cell, sys.argv[1])\n"
    )
    (tmp_path / "parent.py").write_text(code)
    words = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "lock")]
    with subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "begun\n"
        parent.kill()
    with (tmp_path / "lock").open() as file:
        deadline = time.monotonic() + 60
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "the cell goes on without its study"
                time.sleep(0.1)
