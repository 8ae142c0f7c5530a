"""The command losses: experts against intervals on held-out images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from remixdit.data import ShardDataset
from remixdit.evaluation.experts import LossesConfig, Rival, evaluate_intervals
from remixdit.evaluation.held_out import open_held_out
from remixdit.evaluation.loss_figures import interval_figure, matrix_figure
from remixdit.evaluation.losses import interval_losses, loss_matrix
from remixdit.model.config import RemixConfig
from remixdit.model.model import RemixDiT
from remixdit.progress import finish
from tests.command_line import (
    files_below,
    json_result,
    pixels,
    refusal,
    remixdit,
    save_model,
    write_folder,
    write_npz,
)
from tests.processes import launch
from tests.tiny import tiny_config, tiny_dit

FILES = {"losses.json", "held-out-loss-by-interval.png", "loss-matrix.png"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Forty images that no model has seen."""
    directory = tmp_path_factory.mktemp("data")
    np.savez(directory / "real.npz", arr_0=pixels(40, seed=1), arr_1=np.arange(40) % 3)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model of 5 experts that is trained on nothing."""
    return save_model(tmp_path_factory.mktemp("models") / "ours", 0)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Photos, some held out, and a run on the rest."""
    root = tmp_path_factory.mktemp("held-out")
    data = write_folder(root / "photos", cat=8, dog=8, elk=8)
    write_folder(root / "others", cat=4, elk=5)
    remixdit(f"train tiny --data {data} --output-dir {root}/run")
    return root


def test_intervals_give_the_losses_of_the_library(model, data, capsys):
    result = json_result(f"losses {model} --data {data}/real.npz", capsys)
    loaded = RemixDiT.from_pretrained(model)
    held, _ = open_held_out(f"{data}/real.npz", loaded.config)
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
    result = json_result(f"losses {uneven} --data {data}/real.npz", capsys)
    found = [row["value"] for row in result["intervals"]]
    assert result["loss"]["value"] == pytest.approx(np.dot([0.02, 0.18, 0.8], found))


def test_a_model_differs_from_itself_by_exactly_nothing(model, data, capsys):
    line = f"{model} --against {model} --data {data}/real.npz"
    result = json_result(f"losses {line} --matrix-images 0", capsys)
    for found in (result["loss"], result["bits_per_dim"], *result["intervals"]):
        assert found["difference"]["value"] == 0
        assert found["difference"]["standard_error"] == 0
    assert result["matrix"]["value"] is None


def test_the_paired_difference_is_surer_than_the_losses(model, data, tmp_path, capsys):
    other = save_model(tmp_path / "other", 0, num_experts=3)
    line = f"{model} --against {other} --data {data}/real.npz"
    result = json_result(f"losses {line} --output {tmp_path}/out", capsys)
    loss = result["loss"]
    assert len(result["intervals"]) == 5  # of the model with more experts
    value = loss["value"] - loss["against"]["value"]
    assert loss["difference"]["value"] == pytest.approx(value)
    assert loss["difference"]["relative"] == pytest.approx(value / loss["against"]["value"])
    assert loss["difference"]["standard_error"] < loss["standard_error"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"losses.json", "loss-matrix.png", "held-out-loss-by-interval.png"}
    assert json.loads((tmp_path / "out" / "losses.json").read_text())["loss"] == loss


def test_two_processes_measure_intervals_as_one_does(model, data, tmp_path):
    line = f"losses {model} --against {model} --data {data}/real.npz"
    remixdit(f"{line} --output {tmp_path}/one.json")
    launch(f"{line} --output {tmp_path}/two.json", 2)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for part in ("loss", "intervals", "bits_per_dim", "matrix", "data"):
        assert one[part] == two[part]


def test_a_plain_model_is_measured_on_ten_intervals(data, tmp_path, capsys):
    plain = save_model(tmp_path / "plain", 0, num_experts=1)
    line = f"{plain} --data {data}/real.npz --num-images 10"
    result = json_result(f"losses {line}", capsys)
    assert [row["from"] for row in result["intervals"]] == list(range(0, 1000, 100))
    assert result["matrix"]["left_out"] == "one expert"
    assert result["loss"]["num_images"] == 10
    remixdit(f"losses {line} --num-intervals 4")
    assert "[750, 1000)" in capsys.readouterr().out


def test_flow_matching_has_losses_and_no_bits(data):
    network = tiny_config(input_size=16, patch_size=4, in_channels=3, learn_sigma=False)
    config = RemixConfig(
        network=network, num_bases=2, num_experts=4, prediction_type="flow_prediction"
    )
    model = RemixDiT(config)
    held, _ = open_held_out(f"{data}/real.npz", config, 6)
    result = finish(evaluate_intervals(model, held, LossesConfig()))
    assert "flow_prediction has no variational bound" in result["bits_per_dim"]["left_out"]
    assert result["intervals"][-1]["to"] == 1
    v = RemixDiT.from_dit(tiny_dit(input_size=16, patch_size=4, in_channels=3), 1, 1)
    with pytest.raises(ValueError, match="prediction_type of --against v must be flow_prediction"):
        finish(evaluate_intervals(model, held, LossesConfig(), Rival("v", v)))


def test_a_rival_sees_its_own_labels_of_the_same_classes(data):
    shape = {"input_size": 16, "patch_size": 4, "in_channels": 3}
    network = tiny_dit(**shape)
    turned = tiny_dit(**shape)
    table = network.y_embedder.embedding_table.weight.detach()
    turned.y_embedder.embedding_table.weight = torch.nn.Parameter(table[[2, 0, 1, 3]])
    model = RemixDiT.from_dit(network, 1, 1, class_names=("cat", "dog", "elk"))
    rival = RemixDiT.from_dit(turned, 1, 1, class_names=("elk", "cat", "dog"))
    held, _ = open_held_out(f"{data}/real.npz", model.config, 6)
    assert len(held.class_labels.unique()) > 1
    found = finish(evaluate_intervals(model, held, LossesConfig(), Rival("turned", rival)))
    assert found["loss"]["difference"]["value"] == 0
    fruits = RemixDiT.from_dit(turned, 1, 1, class_names=("elk", "cat", "pear"))
    with pytest.raises(ValueError, match=r"--against fruits .* adds 'pear' and lacks 'dog'"):
        finish(evaluate_intervals(model, held, LossesConfig(), Rival("fruits", fruits)))


def test_figures_show_the_losses_and_the_matrix(model, data):
    loaded = RemixDiT.from_pretrained(model)
    held, _ = open_held_out(f"{data}/real.npz", loaded.config)
    result = finish(evaluate_intervals(loaded, held, LossesConfig(), Rival("same", loaded)))
    owned = interval_losses(loaded, held, loaded.intervals)[0].mean(-1)
    losses = interval_figure(result, "ours", "same").axes[0].lines
    assert len(losses) == 2
    for line in losses:
        np.testing.assert_allclose(line.get_ydata(), owned)
    matrix = loss_matrix(loaded, held)
    excess = 100 * (matrix / matrix.min(0) - 1)
    shown = matrix_figure(result, "ours").axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, excess, rtol=1e-4, atol=1e-4)


def test_bars_of_a_comparison_are_errors_of_paired_differences(model, data):
    loaded = RemixDiT.from_pretrained(model)
    held, _ = open_held_out(f"{data}/real.npz", loaded.config)
    result = finish(evaluate_intervals(loaded, held, LossesConfig(), Rival("same", loaded)))
    for number, row in enumerate(result["intervals"]):
        row["difference"]["standard_error"] = 0.01 * (number + 1) * row["against"]["value"]
    bars = interval_figure(result, "ours", "same").axes[1].collections
    assert len(bars) == 1  # the model compared with has no difference from itself
    heights = [high - low for (_, low), (_, high) in bars[0].get_segments()]
    np.testing.assert_allclose(heights, [2.0 * (n + 1) for n in range(len(heights))])


# of runs


@pytest.mark.parametrize("encoded", [False, True], ids=["folder", "shards"])
def test_a_run_is_measured_on_held_out_images(encoded, given, tmp_path, capsys):
    data = given / "others"
    if encoded:
        remixdit(f"encode {data} --output {tmp_path}/shards --image-size 16")
        data = tmp_path / "shards"
    result = json_result(f"losses {given}/run --data {data} --output {tmp_path}/out", capsys)
    assert result["data"]["num_images"] == 9
    assert result["data"]["labelled"]
    assert files_below(tmp_path / "out") == FILES
    with Image.open(tmp_path / "out" / "loss-matrix.png") as picture:
        assert min(picture.size) > 300


def test_a_plain_run_is_measured_on_its_strata(tmp_path, capsys):
    data = write_npz(tmp_path / "pictures.npz")
    options = "--num-bases 1 --num-experts 1 --timestep-strata 4"
    remixdit(f"train tiny --data {data} --output-dir {tmp_path}/run --steps 1 {options}")
    line = f"losses {tmp_path}/run --data {data}"
    result = json_result(f"{line} --output {tmp_path}/out", capsys)
    assert [row["to"] for row in result["intervals"]] == [49, 154, 347, 1000]
    assert files_below(tmp_path / "out") == FILES - {"loss-matrix.png"}
    assert len(json_result(f"{line} --num-intervals 3", capsys)["intervals"]) == 3


def test_a_run_of_continuous_time_is_measured(tmp_path):
    data = write_npz(tmp_path / "pictures.npz")
    options = "--prediction-type flow_prediction --logit-normal"
    remixdit(f"train tiny --data {data} --output-dir {tmp_path}/run --steps 1 {options}")
    line = f"losses {tmp_path}/run --data {data} --num-images 4"
    remixdit(f"{line} --output {tmp_path}/matrix.png")
    remixdit(f"{line} --output {tmp_path}/out")
    assert files_below(tmp_path / "out") == FILES
    assert (tmp_path / "matrix.png").is_file()


# refusals


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("", "required: --data STR (remixdit losses --help says more)"),
        ("--data {}/nowhere", "no such file or folder, nor owner/name on the hub"),
        ("--data {0}/cows", "classes of {0}/cows must be among those of the model, got 'cow'"),
        ("--data {}/small", "must be (3, 16, 16), as for the model, got (3, 8, 8)"),
        ("--data {0}/others --num-images 1", "and at most the 9 of {0}/others, got 1"),
        ("--data {0}/others --num-images 10", "and at most the 9 of {0}/others, got 10"),
        ("--data {}/others --device tpu", "device must be auto, cpu or cuda, got 'tpu'"),
        ("--data {}/others --precision fp16", "precision must be fp32 or bf16, got 'fp16'"),
        ("--data {}/others --matrix-images -1", "matrix_images must be at least 0, got -1"),
        ("--data {}/others --batch-size 0", "batch_size must be at least 1, got 0"),
        ("--data {}/small --split test", "split must be left out for shards, got 'test' for"),
        ("--data {}/others --output a.txt", "a .png or a directory, got a.txt"),
    ],
)
def test_requests_that_make_no_sense_are_refused(options, sentence, given, tmp_path, capsys):
    if not (given / "cows").exists():
        write_folder(given / "cows", cat=2, cow=2)
        remixdit(f"encode {given}/others --output {given}/small --image-size 8")
    line = f"losses {given}/run --output {tmp_path}/out {options.format(given)}"
    assert sentence.format(given) in refusal(line, capsys)
    assert files_below(tmp_path) == set()


def test_a_result_is_not_replaced_unless_asked(model, data, tmp_path, capsys):
    (tmp_path / "losses.json").write_text("mine")
    line = f"losses {model} --data {data}/real.npz --num-images 2 --output {tmp_path}"
    assert "output must not exist" in refusal(line, capsys)
    assert files_below(tmp_path) == {"losses.json"}
    remixdit(f"{line} --overwrite")
    assert files_below(tmp_path) == FILES


def test_images_are_no_model(data, tmp_path, capsys):
    message = refusal(f"losses {data}/real.npz --data {data}/real.npz", capsys)
    assert message.startswith("model must be a directory or a model of the hub, got ")


def test_a_run_without_weights_has_no_loss_to_measure(given, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    message = refusal(f"losses {tmp_path}/run --data {given}/others", capsys)
    assert message.startswith("checkpoint must be a model directory or a run with one")
    assert files_below(tmp_path / "run") == {"metrics.jsonl"}


def test_latents_are_measured_and_pixels_refused_for_a_model_of_them(given, tmp_path, capsys):
    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=2,
    )
    network.save_pretrained(tmp_path / "kl")
    options = f"--image-size 16 --autoencoder {tmp_path}/kl"
    for name in ("photos", "others"):
        remixdit(f"encode {given}/{name} --output {tmp_path}/{name} {options}")
    run = tmp_path / "run"
    remixdit(f"train tiny --data {tmp_path}/photos --output-dir {run} --steps 1 --patch-size 2")
    result = json_result(f"losses {run} --data {tmp_path}/others", capsys)
    assert "latents of an autoencoder" in result["bits_per_dim"]["left_out"]
    message = refusal(f"losses {run} --data {given}/others", capsys)
    assert message.startswith(
        f"data must be shards that `remixdit encode` wrote with {tmp_path}/kl"
    )
    network.register_to_config(scaling_factor=0.5)
    network.save_pretrained(tmp_path / "kl")
    remixdit(f"encode {given}/others --output {tmp_path}/scaled {options}")
    assert ShardDataset(tmp_path / "scaled").autoencoder["scaling_factor"] == 0.5
    for line in (
        f"losses {run} --data {tmp_path}/scaled",
        f"train tiny --data {tmp_path}/scaled --from {run} --output-dir {tmp_path}/new",
        f"sample {run} --num-images 1 --num-inference-steps 1 --output {tmp_path}/new.png",
    ):
        assert "scaling_factor of " in refusal(line, capsys)
    assert not list(tmp_path.glob("new*"))
