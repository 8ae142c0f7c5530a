"""The command evaluate: scores of samples and files, and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from remixdit.cli.evaluation_text import images_text
from remixdit.cli.main import main
from remixdit.data import open_source
from remixdit.evaluation import images as image_evaluation
from remixdit.evaluation.checks import conditional_accuracy, copies, matched_labels
from remixdit.evaluation.feature_sets import image_features, reference_features
from remixdit.evaluation.features import load_extractor, write_statistics
from remixdit.evaluation.left_out import LeftOut
from remixdit.evaluation.metrics import gaussian, kernel_distance
from remixdit.model.model import RemixDiT
from tests.command_line import (
    json_result,
    pixels,
    refusal,
    remixdit,
    save_model,
    write_folder,
    write_npz,
)
from tests.processes import launch
from tests.tiny import COLOURS, save_tiny, tiny_dit

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


def values(result: dict) -> dict[str, float]:
    found = {name: score["value"] for name, score in result["scores"].items()}
    return {name: value for name, value in found.items() if value is not None}


# scores


def test_files_are_scored_as_the_library_scores_them(data, capsys):
    result = json_result(f"evaluate {data}/fake.npz --reference {data}/real.npz", capsys)
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
    draw = f"{FAST} --guidance-scale 2 --thresholding static --seed 3"
    where = f"--reference {data}/real.npz"
    result = json_result(f"evaluate {model} {where} {draw}", capsys)
    remixdit(f"sample {model} {draw} --output {tmp_path}/s.npz")
    remixdit(f"sample {model} {draw} --output {tmp_path}/s")
    for path in ("s.npz", "s"):
        other = json_result(f"evaluate {tmp_path / path} {where} --seed 3", capsys)
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
    assert (drawn["guidance_interval"], drawn["thresholding"]) == ([0, 1], "static")
    assert "guidance 2 on [0, 1], static thresholding, seed 3" in images_text(other)
    assert drawn["labels"] == "balanced: image i takes label i mod 3, all classes in turn"
    assert (drawn["precision"], drawn["ema"]) == ("fp32", True)


@pytest.mark.usefixtures("quick")
def test_the_cost_of_a_step_stands_beside_the_scores(model, data, capsys):
    plain = json_result(
        f"evaluate {model} --reference {data}/real.npz {FAST} --no-real-floor", capsys
    )
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
    result = json_result(f"evaluate {data}/fake.npz --reference {tmp_path}/known.npz", capsys)
    whole = json_result(
        f"evaluate {data}/fake.npz --reference {data}/real.npz --no-real-floor", capsys
    )
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
    result = json_result(f"evaluate {data}/fake.npz --reference {tmp_path}/both.npz", capsys)
    apart = json_result(f"evaluate {data}/fake.npz --reference {data}/real.npz", capsys)
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
    result = json_result(f"evaluate {data}/fake.npz --reference {tmp_path}/both.npz", capsys)
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
    result = json_result(f"evaluate {line} {FAST} --no-real-floor", capsys)
    assert result["evaluated"]["image_size"] == 16
    assert any("decoded from latents" in note for note in result["notes"])


@pytest.mark.usefixtures("quick")
def test_copies_of_the_training_images_are_told(data, capsys):
    line = f"{data}/fake.npz --reference {data}/real.npz --train {data}/fake.npz --no-real-floor"
    found = json_result(f"evaluate {line}", capsys)["memorisation"]
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
    with pytest.raises(LeftOut, match="needs at least 2 classes in the reference"):
        conditional_accuracy(real, np.full(90, -1), real, labels)


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
    with pytest.raises(LeftOut, match="the reference has no class 'ape'"):
        matched_labels(zoo, pets)
    assert matched_labels(counted, pets).tolist() == [0, 1, 0, 1, 0, 1]
    with pytest.raises(LeftOut, match="label 2 is under test"):
        matched_labels(zoo, counted)
    (tmp_path / "loose").mkdir()
    (tmp_path / "zoo" / "ape" / "0.png").rename(tmp_path / "loose" / "0.png")
    loose = open_images(tmp_path / "loose")
    with pytest.raises(LeftOut, match="the images under test have no labels"):
        matched_labels(loose, pets)
    with pytest.raises(LeftOut, match="the images of the reference have no labels"):
        matched_labels(pets, loose)


@pytest.mark.usefixtures("quick")
def test_a_model_that_has_diverged_is_an_error_of_its_own(data, tmp_path, capsys):
    network = tiny_dit(input_size=16, patch_size=4, in_channels=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1e30)  # finite, as what is not is refused when it is read
    RemixDiT.from_dit(network, 1, 1).save_pretrained(tmp_path / "huge")
    line = f"evaluate {tmp_path}/huge --reference {data}/real.npz"
    assert "the model has diverged" in refusal(f"{line} {FAST}", capsys, code=1)
    line = f"losses {tmp_path}/huge --data {data}/real.npz"
    assert "the model has diverged" in refusal(line, capsys, code=1)


# refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "checkpoint must be given: a model, or images to score"),
        ("{data}/fake.npz", "reference must be given: real images, or an .npz"),
        ("{data}/none.npz --reference {data}/real.npz", "none.npz: no such file or folder"),
        ("{data}/fake.npz --reference {data}/none", "none: no such file or folder"),
        ("{data}/fake.npz --reference {data}/real.npz --num-images 25", "must be at most 24"),
        ("{data}/fake.npz --reference {data}/real.npz --num-images 1", "must be at least 2, got 1"),
        ("{data}/fake.npz --reference {data}/real.npz --guidance-scale 2", "must be left out for"),
        ("{data}/fake.npz --reference {data}/real.npz --batch-size 8", "batch_size must be left"),
        ("{data}/fake.npz --reference {data}/real.npz --no-ema", "ema must be left out for images"),
        ("{data}/fake.npz --reference {data}/real.npz --num-images -1", "num_images must be at"),
        ("{data}/fake.npz --reference {data}/real.npz --split test", "has no splits"),
        ("{data}/fake.npz --reference {data}/real.npz --output a.txt", "output must be a .json"),
        ("{data}/fake.npz --reference {data}/real.npz --output a.png", "output must be a .json"),
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
        ("--self-test --seed 3", "seed must be left out for --self-test, got 3"),
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
    assert "must be (3, 16, 16)" in refusal(f"losses {model} --data {tmp_path}/shards", capsys)


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


@pytest.mark.parametrize("flag", ["--per-interval", "--against=x", "--matrix_images"])
def test_what_has_moved_is_named_with_its_command(flag, model, data, capsys):
    found = refusal(f"evaluate {model} --reference {data}/real.npz {flag}", capsys)
    assert found.endswith(
        "has moved to another command: remixdit losses CHECKPOINT --data HELD_OUT"
    )
    for option in ("--held-out x", "--held-out-images 3"):
        assert "remixdit losses RUN --data" in refusal(f"plot {model} {option}", capsys)


def test_a_model_that_is_not_there_is_not_asked_of_the_hub(data, capsys):
    message = refusal(f"losses nothere --data {data}/real.npz", capsys)
    assert message == "nothere: no such model, nor owner/name on the hub"


def test_help_is_printed(capsys):
    assert main(["evaluate", "--help"]) == 0
    assert "--guidance-scale" in capsys.readouterr().out
