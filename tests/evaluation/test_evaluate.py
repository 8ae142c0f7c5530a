"""The command evaluate: scores of samples and files, experts by interval, and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from remixdit.cli.main import main
from remixdit.data import open_source
from remixdit.evaluation import images as image_evaluation
from remixdit.evaluation.checks import conditional_accuracy, copies, matched_labels
from remixdit.evaluation.experts import IntervalConfig, Rival, evaluate_intervals, open_held
from remixdit.evaluation.features import load_extractor, write_statistics
from remixdit.evaluation.losses import interval_losses
from remixdit.evaluation.metrics import gaussian, kernel_distance
from remixdit.evaluation.scores import image_features, reference_features
from remixdit.model.config import RemixConfig
from remixdit.model.model import RemixDiT
from remixdit.progress import finish
from tests.command_line import pixels, refusal, remixdit, write_folder, write_npz
from tests.processes import launch
from tests.tiny import COLOURS, save_tiny, tiny_config, tiny_dit

FAST = "--num-images 20 --num-inference-steps 3 --batch-size 8"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Real images, 40 to compare with and 24 others."""
    directory = tmp_path_factory.mktemp("data")
    np.savez(directory / "real.npz", arr_0=pixels(40, seed=1), arr_1=np.arange(40) % 3)
    np.savez(directory / "fake.npz", arr_0=pixels(24, seed=2), arr_1=np.arange(24) % 3)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model of 5 experts that is trained on nothing."""
    directory = tmp_path_factory.mktemp("models") / "ours"
    return save_model(directory, 0)


@pytest.fixture
def quick(monkeypatch) -> None:
    """An extractor that takes no time."""
    monkeypatch.setattr(image_evaluation, "load_extractor", lambda *_, **__: COLOURS)


def save_model(directory: Path, seed: int, num_experts: int = 5, **options: object) -> Path:
    network = tiny_dit(seed, input_size=16, patch_size=4, in_channels=3)
    model = RemixDiT.from_dit(network, min(2, num_experts), num_experts, **options)
    if num_experts > 1:
        model.mixture.perturb(0.3, torch.Generator().manual_seed(seed))
    model.save_pretrained(directory)
    return directory


def result_of(line: str, capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    remixdit(f"evaluate {line} --json")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(capsys.readouterr().out, parse_constant=refuse)


def values(result: dict) -> dict[str, float]:
    found = {name: score["value"] for name, score in result["scores"].items()}
    return {name: value for name, value in found.items() if value is not None}


# scores


def test_files_are_scored_as_the_library_scores_them(data, capsys):
    result = result_of(f"{data}/fake.npz --reference {data}/real.npz", capsys)
    extractor = load_extractor("lite0")
    real = reference_features(open_source(data / "real.npz"), extractor)
    fake = image_features([pixels(24, seed=2)], extractor)
    expected = kernel_distance(real.pool, fake.pool)
    found = result["scores"]["KID-lite0"]
    assert found["value"] == pytest.approx(expected.value, rel=1e-4)
    assert found["standard_error"] == pytest.approx(expected.standard_error, rel=1e-4)
    assert (found["num_images"], found["num_reference"]) == (24, 40)
    assert result["extractor"]["weights_sha256"].startswith("57934424")
    assert result["scores"]["sFID-lite0"]["left_out"] == "extractor lite0 has no spatial features"
    assert "cost" not in result
    assert any("mostly its floor" in note for note in result["notes"])


@pytest.mark.usefixtures("quick")
def test_samples_are_scored_as_their_files_are(model, data, tmp_path, capsys):
    """On the fly, from an npz and from a folder of PNGs: the same images, the same scores."""
    draw = f"{FAST} --guidance-scale 2 --seed 3"
    where = f"--reference {data}/real.npz"
    result = result_of(f"{model} {where} {draw}", capsys)
    remixdit(f"sample {model} {draw} --output {tmp_path}/s.npz")
    remixdit(f"sample {model} {draw} --output {tmp_path}/s")
    for path in ("s.npz", "s"):
        other = result_of(f"{tmp_path / path} {where} --seed 3", capsys)
        for name, value in values(result).items():
            assert values(other)[name] == pytest.approx(value, rel=1e-3), name
        accuracy = other["conditional_accuracy"]["value"]
        assert accuracy == result["conditional_accuracy"]["value"]
    assert other["evaluated"]["sampling"]["guidance_scale"] == 2
    assert other["evaluated"]["sampling"]["scheduler"] == "ddpm"
    cost = result["cost"]
    assert cost["step_flops_per_image"] == 2 * cost["forward_flops_per_image"]  # guided
    drawn = result["evaluated"]["sampling"]
    assert (drawn["scheduler"], drawn["num_inference_steps"], drawn["seed"]) == ("ddpm", 3, 3)
    assert drawn["guidance_interval"] == [0, 1]
    assert drawn["labels"] == "balanced: image i takes label i mod 3, all classes in turn"
    assert (drawn["precision"], drawn["ema"]) == ("fp32", True)


@pytest.mark.usefixtures("quick")
def test_the_cost_of_a_step_stands_beside_the_scores(model, data, capsys):
    plain = result_of(f"{model} --reference {data}/real.npz {FAST} --no-real-floor", capsys)
    assert plain["cost"]["parameters"]["total"] > plain["cost"]["parameters"]["active"]
    assert plain["cost"]["step_flops_per_image"] == plain["cost"]["forward_flops_per_image"]
    assert [row["batch_size"] for row in plain["cost"]["step_latency"]] == [1, 8]
    assert plain["scores"]["KID-colours"]["real"]["left_out"] == "not asked for"


def test_two_processes_score_as_one_does(model, data, tmp_path):
    few = f"{FAST} --reference-images 18 --no-real-floor"
    line = f"evaluate {model} --reference {data}/real.npz {few} --output {tmp_path}"
    remixdit(f"{line}/one.json")
    launch(f"{line}/two.json", 2)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for name, value in values(one).items():
        assert values(two)[name] == pytest.approx(value, rel=1e-6), name
    assert one["scores"].keys() == two["scores"].keys()
    assert one["conditional_accuracy"] == two["conditional_accuracy"]


@pytest.mark.usefixtures("quick")
def test_statistics_leave_out_what_needs_images_and_say_why(data, tmp_path, capsys):
    real = reference_features(open_source(data / "real.npz"), COLOURS)
    write_statistics(tmp_path / "known.npz", gaussian(real.pool))
    result = result_of(f"{data}/fake.npz --reference {tmp_path}/known.npz", capsys)
    whole = result_of(f"{data}/fake.npz --reference {data}/real.npz --no-real-floor", capsys)
    for name in ("FID-colours", "IS-colours"):
        assert values(result)[name] == pytest.approx(values(whole)[name], rel=1e-4)
    for name in ("KID-colours", "precision-colours", "recall-colours"):
        assert "holds statistics only" in result["scores"][name]["left_out"]
    assert result["conditional_accuracy"]["left_out"] == "needs images of the reference"


@pytest.mark.usefixtures("quick")
def test_a_reference_of_both_uses_statistics_for_the_distance_alone(data, tmp_path, capsys):
    """As ADM's files: the distance to all images' statistics, the rest to the images given."""
    more = image_features([pixels(60, seed=5)], COLOURS).pool
    mean, covariance = (values.numpy() for values in gaussian(more))
    images = pixels(40, seed=1)
    np.savez(tmp_path / "both.npz", mu=mean, sigma=covariance, arr_0=images)
    result = result_of(f"{data}/fake.npz --reference {tmp_path}/both.npz", capsys)
    apart = result_of(f"{data}/fake.npz --reference {data}/real.npz", capsys)
    assert values(result)["KID-colours"] == pytest.approx(values(apart)["KID-colours"], rel=1e-4)
    assert values(result)["FID-colours"] != pytest.approx(values(apart)["FID-colours"], rel=1e-2)
    assert result["reference"]["statistics"] == "of the file"
    assert any("does not say which extractor" in note for note in result["notes"])


@pytest.mark.usefixtures("quick")
def test_statistics_of_another_extractor_are_refused_or_left_alone(data, tmp_path, capsys):
    write_statistics(tmp_path / "s.npz", (torch.zeros(5), torch.eye(5)))
    line = f"evaluate {data}/fake.npz --reference {tmp_path}/s.npz"
    assert "statistics of the 6 features of extractor colours" in refusal(line, capsys)
    np.savez(tmp_path / "both.npz", mu=np.zeros(5), sigma=np.eye(5), arr_0=pixels(40, seed=1))
    result = result_of(f"{data}/fake.npz --reference {tmp_path}/both.npz", capsys)
    assert result["reference"]["statistics"] == "of another extractor, not used"
    assert result["scores"]["FID-colours"]["num_reference"] == 40


@pytest.mark.usefixtures("quick")
def test_latents_are_decoded_on_both_sides(data, tmp_path, capsys):
    save_tiny(tmp_path / "vae")
    encode = f"encode {data}/real.npz --image-size 16 --autoencoder {tmp_path}/vae"
    remixdit(f"{encode} --output {tmp_path}/latents")
    shards = f"{tmp_path}/latents"
    config = json.loads((tmp_path / "latents" / "index.json").read_text())
    network = tiny_dit(input_size=8, patch_size=2, in_channels=4)
    spec = config["autoencoder"]
    RemixDiT.from_dit(network, 2, 5, autoencoder=spec).save_pretrained(tmp_path / "model")
    line = f"{tmp_path}/model --reference {shards}"
    result = result_of(f"{line} {FAST} --no-real-floor", capsys)
    assert result["evaluated"]["image_size"] == 16
    assert any("decoded from latents" in note for note in result["notes"])
    by_interval = result_of(f"{line} --per-interval --matrix-images 0", capsys)
    assert "latents of an autoencoder" in by_interval["bits_per_dim"]["left_out"]
    line = f"evaluate {tmp_path}/model --per-interval --reference {data}/real.npz"
    assert "must be shards for a model of latents" in refusal(line, capsys)


@pytest.mark.usefixtures("quick")
def test_copies_of_the_training_images_are_told(data, capsys):
    line = f"{data}/fake.npz --reference {data}/real.npz --train {data}/fake.npz --no-real-floor"
    found = result_of(line, capsys)["memorisation"]
    assert found["value"] == 1
    assert found["closest"][0]["distance"] == pytest.approx(0, abs=1e-3)
    assert all(pair["image"] == pair["train_image"] for pair in found["closest"])
    line = f"evaluate {data}/fake.npz --reference {data}/real.npz --train {data}/real.npz"
    assert "train must be other images than the reference" in refusal(line, capsys)


@pytest.mark.usefixtures("quick")
def test_a_folder_of_pictures_and_a_table_for_a_person(tmp_path, data, capsys):
    folder = write_folder(tmp_path / "photos", cat=6, dog=6)
    (folder / "cat" / "2.png").write_bytes(b"no image")
    remixdit(f"evaluate {folder} --reference {data}/real.npz")
    printed = capsys.readouterr()
    assert "11 of 16 x 16" in printed.out
    assert "1 unreadable" in printed.out
    assert "KID-colours" in printed.out
    assert "left out 2.png" in printed.err or "cat/2.png" in printed.err


def test_the_self_test_passes(capsys):
    remixdit("evaluate --self-test")
    assert "13 of 13 checks passed" in capsys.readouterr().out
    remixdit("evaluate --self-test --json")
    assert all(check["passed"] for check in json.loads(capsys.readouterr().out))


# checks


def test_a_probe_finds_the_classes_of_images_that_show_them():
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(90) % 3
    real = torch.eye(3)[labels] + 0.1 * torch.randn(90, 3, generator=generator)
    right = conditional_accuracy(real, labels, real[:30], labels[:30])
    assert right["value"] == right["real"]["value"] == 1
    assert right["chance"] == pytest.approx(1 / 3)
    wrong = conditional_accuracy(real, labels, real[:30], (labels[:30] + 1) % 3)
    assert wrong["value"] == 0
    unlabelled = conditional_accuracy(real, np.full(90, -1), real, labels)
    assert unlabelled["left_out"] == "needs at least 2 classes in the reference"


def test_fresh_images_are_no_copies():
    generator = torch.Generator().manual_seed(0)
    fresh, train, held_out = torch.randn(3, 300, 4, generator=generator)
    found = copies(fresh, train, held_out)
    assert abs(found["value"] - 0.5) < 4 * found["standard_error"]


def test_labels_are_matched_by_name_or_by_number(tmp_path):
    from remixdit.evaluation.image_sets import open_images

    pets = open_images(write_folder(tmp_path / "pets", cat=2, dog=2))
    zoo = open_images(write_folder(tmp_path / "zoo", ape=2, cat=2, dog=2))
    counted = open_images(write_npz(tmp_path / "a.npz", 6, num_classes=2))
    assert matched_labels(pets, zoo).tolist() == [1, 1, 2, 2]
    assert matched_labels(zoo, pets) == "the reference has no class 'ape'"
    assert matched_labels(counted, pets).tolist() == [0, 1, 0, 1, 0, 1]
    assert "label 2 is under test" in matched_labels(zoo, counted)
    (tmp_path / "loose").mkdir()
    (tmp_path / "zoo" / "ape" / "0.png").rename(tmp_path / "loose" / "0.png")
    loose = open_images(tmp_path / "loose")
    assert matched_labels(loose, pets) == "the images under test have no labels"
    assert matched_labels(pets, loose) == "the images of the reference have no labels"


# by interval


def test_intervals_give_the_losses_of_the_library(model, data, capsys):
    result = result_of(f"{model} --per-interval --reference {data}/real.npz", capsys)
    loaded = RemixDiT.from_pretrained(model)
    held, _ = open_held(f"{data}/real.npz", loaded)
    losses = interval_losses(loaded, held, loaded.intervals)[0]  # (I, n)
    assert len(held.latents) == 40
    assert result["loss"]["value"] == pytest.approx(losses.mean())
    found = [row["value"] for row in result["intervals"]]
    np.testing.assert_allclose(found, losses.mean(1))
    matrix = np.array(result["matrix"]["value"])
    np.testing.assert_allclose(np.diag(matrix), losses.mean(1), rtol=1e-5)
    error = losses.mean(0).std(ddof=1) / 40**0.5
    assert result["loss"]["standard_error"] == pytest.approx(error)
    assert result["loss"]["interval"][0] == pytest.approx(losses.mean() - 1.96 * error, rel=1e-4)
    assert result["bits_per_dim"]["value"] > 0
    assert result["bits_per_dim"]["variance"] == {"ours": "learned"}


def test_the_mean_counts_every_timestep_alike_however_the_intervals_are_cut(data, tmp_path, capsys):
    uneven = save_model(tmp_path / "uneven", 0, num_experts=3, boundaries=(0, 20, 200, 1000))
    result = result_of(f"{uneven} --per-interval --reference {data}/real.npz", capsys)
    found = [row["value"] for row in result["intervals"]]
    assert result["loss"]["value"] == pytest.approx(np.dot([0.02, 0.18, 0.8], found))


def test_a_model_differs_from_itself_by_exactly_nothing(model, data, capsys):
    line = f"{model} --per-interval --against {model} --reference {data}/real.npz"
    result = result_of(f"{line} --matrix-images 0", capsys)
    for found in (result["loss"], result["bits_per_dim"], *result["intervals"]):
        assert found["difference"]["value"] == 0
        assert found["difference"]["standard_error"] == 0
    assert result["matrix"]["value"] is None


def test_the_paired_difference_is_surer_than_the_losses(model, data, tmp_path, capsys):
    other = save_model(tmp_path / "other", 0, num_experts=3)
    line = f"{model} --per-interval --against {other} --reference {data}/real.npz"
    result = result_of(f"{line} --output {tmp_path}/out", capsys)
    loss = result["loss"]
    assert len(result["intervals"]) == 5  # of the model with more experts
    value = loss["value"] - loss["against"]["value"]
    assert loss["difference"]["value"] == pytest.approx(value)
    assert loss["difference"]["relative"] == pytest.approx(value / loss["against"]["value"])
    assert loss["difference"]["standard_error"] < loss["standard_error"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"evaluation.json", "loss-matrix.png", "loss-by-interval.png"}
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["loss"] == loss


def test_two_processes_measure_intervals_as_one_does(model, data, tmp_path):
    line = f"evaluate {model} --per-interval --against {model} --reference {data}/real.npz"
    remixdit(f"{line} --output {tmp_path}/one.json")
    launch(f"{line} --output {tmp_path}/two.json", 2)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for part in ("loss", "intervals", "bits_per_dim", "matrix", "reference"):
        assert one[part] == two[part]


def test_a_plain_model_is_measured_on_ten_intervals(data, tmp_path, capsys):
    plain = save_model(tmp_path / "plain", 0, num_experts=1)
    line = f"{plain} --per-interval --reference {data}/real.npz --num-images 10"
    result = result_of(line, capsys)
    assert [row["from"] for row in result["intervals"]] == list(range(0, 1000, 100))
    assert result["matrix"]["left_out"] == "one expert"
    assert result["loss"]["num_images"] == 10
    remixdit(f"evaluate {line} --num-intervals 4")
    assert "[750, 1000)" in capsys.readouterr().out


def test_flow_matching_has_losses_and_no_bits(data):
    network = tiny_config(input_size=16, patch_size=4, in_channels=3, learn_sigma=False)
    config = RemixConfig(
        network=network, num_bases=2, num_experts=4, prediction_type="flow_prediction"
    )
    model = RemixDiT(config)
    held, _ = open_held(f"{data}/real.npz", model, 6)
    result = finish(evaluate_intervals(model, held, IntervalConfig()))
    assert "flow_prediction has no variational bound" in result["bits_per_dim"]["left_out"]
    assert result["intervals"][-1]["to"] == 1
    v = RemixDiT.from_dit(tiny_dit(input_size=16, patch_size=4, in_channels=3), 1, 1)
    with pytest.raises(ValueError, match="against must have the prediction_type flow_prediction"):
        finish(evaluate_intervals(model, held, IntervalConfig(), Rival("v", v)))


@pytest.mark.usefixtures("quick")
def test_a_model_that_has_diverged_is_an_error_of_its_own(data, tmp_path, capsys):
    network = tiny_dit(input_size=16, patch_size=4, in_channels=3)
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    RemixDiT.from_dit(network, 1, 1).save_pretrained(tmp_path / "nan")
    line = f"evaluate {tmp_path}/nan --reference {data}/real.npz"
    assert "the model has diverged" in refusal(f"{line} {FAST}", capsys, code=1)
    assert "the model has diverged" in refusal(f"{line} --per-interval", capsys, code=1)


# refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "checkpoint must be given: a model, or images to score"),
        ("{data}/fake.npz", "reference must be given: real images, or an .npz"),
        ("{model} --per-interval", "reference must be given: held-out images"),
        ("{data}/none.npz --reference {data}/real.npz", "none.npz: no such file or folder"),
        ("{data}/fake.npz --reference {data}/none", "none: no such file or folder"),
        ("{data}/fake.npz --reference {data}/real.npz --num-images 25", "must be at most 24"),
        ("{data}/fake.npz --reference {data}/real.npz --num-images 1", "must be at least 2, got 1"),
        ("{data}/fake.npz --reference {data}/real.npz --guidance-scale 2", "must be left out for"),
        ("{data}/fake.npz --reference {data}/real.npz --against x", "against must be left out for"),
        ("{data}/fake.npz --reference {data}/real.npz --per-interval", "must be a model for"),
        ("{data}/fake.npz --reference {data}/real.npz --split test", "has no splits"),
        ("{data}/fake.npz --reference {data}/real.npz --output a.txt", "output must be a .json"),
        ("{data}/fake.npz --reference {data}/real.npz --output a.png", "without --per-interval"),
        ("{data}/fake.npz --reference {data}/real.npz --output {data}/real.json/x", ""),
        ("{data}/fake.npz --reference {data}/real.npz --extractor vgg", "extractor must be one of"),
        (
            "{data}/fake.npz --reference {data}/real.npz --extractor inception",
            "must be the path of",
        ),
        ("{data}/fake.npz --reference {data}/real.npz --extractor-weights a", "must be a file"),
        ("{model} --reference {data}/real.npz --precision fp16", "precision must be fp32 or bf16"),
        ("{model} --reference {data}/real.npz --image-size 8", "image_size must be left out for"),
        ("{model} --reference {data}/real.npz --train-split x", "train_split must come with train"),
        ("{model} --reference {data}/real.npz --class-labels 7", "class_labels must be in"),
        ("{model} --reference {data}/real.npz --scheduler euler", "scheduler must be one of"),
        ("{model} --reference {data}/real.npz --per-interval --num-images 1", "at least 2"),
        ("{model} --reference {data}/real.npz --per-interval --num-images 50", "at most the 40"),
        ("{model} --reference {data}/real.npz --per-interval --extractor inception", "left out"),
    ],
)
def test_requests_without_sense_are_refused(words, message, model, data, capsys):
    if "real.json" in words:
        (data / "real.json").write_text("{}")
        message = "output must be in a directory"
    assert message in refusal(f"evaluate {words.format(model=model, data=data)}", capsys)


@pytest.mark.usefixtures("quick")
def test_results_are_not_replaced_unless_asked(data, tmp_path, capsys):
    output = tmp_path / "r.json"
    output.write_text("mine")
    line = f"evaluate {data}/fake.npz --reference {data}/real.npz --no-real-floor"
    assert "output must not exist" in refusal(f"{line} --output {output}", capsys)
    assert output.read_text() == "mine"
    remixdit(f"{line} --output {output} --overwrite")
    assert json.loads(output.read_text())["evaluated"]["num_images"] == 24


@pytest.mark.usefixtures("quick")
def test_shards_of_another_size_are_refused_before_any_sample(model, data, tmp_path, capsys):
    remixdit(f"encode {data}/real.npz --image-size 8 --output {tmp_path}/shards")
    line = f"evaluate {model} --reference {tmp_path}/shards"
    assert "image_size of" in refusal(line, capsys)
    assert "must be (3, 16, 16)" in refusal(f"{line} --per-interval", capsys)


def test_files_that_are_not_what_their_name_says_are_refused(model, data, tmp_path, capsys):
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"garbage")
    for line in (f"{bad} --reference {data}/real.npz", f"{model} --reference {bad}"):
        message = f"{bad} cannot be read as npz: it is no whole zip archive"
        assert refusal(f"evaluate {line}", capsys) == message
    line = f"evaluate {model} --reference {data}/real.npz --extractor"
    for extractor in ("inception", "lite0"):
        found = refusal(f"{line} {extractor} --extractor-weights {bad}", capsys)
        assert found == f"extractor_weights must be weights of extractor {extractor}, got {bad}"
    line = f"evaluate {model} --per-interval --reference {data}/real.npz --against"
    assert refusal(f"{line} nothere", capsys) == "nothere: no such model, nor owner/name on the hub"


def test_help_is_printed(capsys):
    assert main(["evaluate", "--help"]) == 0
    assert "--per-interval" in capsys.readouterr().out
