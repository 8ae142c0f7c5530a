"""Losses on images that a run has not seen, measured and drawn."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from remixdit.data import ShardDataset
from remixdit.evaluation.held_out import (
    expert_losses,
    held_out_figures,
    held_out_images,
    relabelled,
)
from remixdit.evaluation.losses import Held, interval_losses, loss_matrix
from remixdit.model.config import RemixConfig
from remixdit.model.loading import load_model
from tests.command_line import files_below, refusal, remixdit, write_folder, write_npz
from tests.tiny import tiny_config, tiny_model

TRAINING = {"coefficients.png", "gradients.png", "loss.png", "loss-by-interval.png"}
MEASURED = {"held-out-loss-by-interval.png", "loss-matrix.png"}
CLASSES = RemixConfig(network=tiny_config(), class_names=("cat", "dog", "elk"))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Photos, some held out, and a run on the rest."""
    root = tmp_path_factory.mktemp("held-out")
    data = write_folder(root / "photos", cat=8, dog=8, elk=8)
    write_folder(root / "others", cat=4, elk=5)
    remixdit(f"train tiny --data {data} --output-dir {root}/run")
    return root


def test_rows_are_those_of_the_loss_matrix():
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    held = Held(torch.randn(6, 1, 8, 8, generator=generator), torch.arange(6) % 3)
    losses = np.array(list(expert_losses(model, held, model.intervals)))
    assert losses.shape == (5, 5, 6)
    assert np.array_equal(losses.mean(-1), loss_matrix(model, held))
    owned = interval_losses(model, held, model.intervals)[0].mean(-1)
    by_interval, matrix = (figure for _, figure in held_out_figures(losses, model.intervals))
    np.testing.assert_allclose(by_interval.axes[0].lines[0].get_ydata(), owned)
    excess = 100 * (losses.mean(-1) / losses.mean(-1).min(0) - 1)
    np.testing.assert_allclose(matrix.axes[0].images[0].get_array(), excess)


@pytest.mark.parametrize("encoded", [False, True], ids=["folder", "shards"])
def test_plot_adds_losses_on_held_out_images(encoded, given, tmp_path):
    data = given / "others"
    if encoded:
        remixdit(f"encode {data} --output {tmp_path}/shards --image-size 16")
        data = tmp_path / "shards"
    remixdit(f"plot {given}/run --output {tmp_path}/plots --held-out {data}")
    assert files_below(tmp_path / "plots") == TRAINING | MEASURED
    with Image.open(tmp_path / "plots" / "loss-matrix.png") as picture:
        assert min(picture.size) > 300


def test_held_out_images_are_spread_over_the_classes(given):
    model = load_model(given / "run")
    held = held_out_images(str(given / "others"), model.config, 3)
    assert held.class_labels.tolist() == [0, 2, 2]  # cat and elk of cat, dog and elk
    with Image.open(given / "others" / "cat" / "0.png") as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(held.latents[0], pixels)
    assert len(held_out_images(str(given / "others"), model.config, 100).latents) == 9


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (("cat", "dog", "elk"), [0, 1, 2, 3], [0, 1, 2, 3]),
        (("elk", "cat"), [0, 1, 2], [2, 0, 3]),
        ((), [0, 0], [3, 3]),  # not labelled
    ],
)
def test_labels_are_matched_by_name(names, labels, expected):
    assert relabelled(torch.tensor(labels), names, CLASSES).tolist() == expected


def test_a_model_without_classes_takes_any_labels():
    config = RemixConfig(network=tiny_config(num_classes=0))
    assert relabelled(torch.tensor([0, 1]), ("cat", "dog"), config).tolist() == [0, 0]


def test_a_plain_run_is_measured_on_its_strata(tmp_path):
    data = write_npz(tmp_path / "pictures.npz")
    options = "--num-bases 1 --num-experts 1 --timestep-strata 4"
    remixdit(f"train tiny --data {data} --output-dir {tmp_path}/run --steps 1 {options}")
    remixdit(f"plot {tmp_path}/run --held-out {data}")
    expected = {"loss.png", "loss-by-interval.png", "held-out-loss-by-interval.png"}
    assert files_below(tmp_path / "run" / "plots") == expected


def test_a_run_of_continuous_time_is_measured(tmp_path):
    data = write_npz(tmp_path / "pictures.npz")
    options = "--prediction-type flow_prediction --logit-normal"
    remixdit(f"train tiny --data {data} --output-dir {tmp_path}/run --steps 1 {options}")
    remixdit(f"plot {tmp_path}/run --held-out {data} --held-out-images 4")
    assert files_below(tmp_path / "run" / "plots") == TRAINING | MEASURED


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--held-out {}/nowhere", "no such file or folder, nor owner/name on the hub"),
        ("--held-out {}/cows", "held_out must hold classes of the run, got 'cow'"),
        ("--held-out {}/small", "must be (3, 16, 16) for this model, got (3, 8, 8)"),
        ("--held-out {}/others --held-out-images 1", "held_out_images must be at least 2, got 1"),
        ("--held-out {}/others --device tpu", "device must be auto, cpu or cuda, got 'tpu'"),
    ],
)
def test_held_out_images_that_do_not_fit_are_refused(options, sentence, given, tmp_path, capsys):
    if not (given / "cows").exists():
        write_folder(given / "cows", cat=2, cow=2)
        remixdit(f"encode {given}/others --output {given}/small --image-size 8")
    line = f"plot {given}/run --output {tmp_path}/plots {options.format(given)}"
    assert refusal(line, capsys).endswith(sentence)
    assert files_below(tmp_path) == set()


def test_a_run_without_weights_has_no_loss_to_measure(given, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    message = refusal(f"plot {tmp_path}/run --held-out {given}/others", capsys)
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
    remixdit(f"plot {run} --held-out {tmp_path}/others")
    assert files_below(run / "plots") >= MEASURED
    message = refusal(f"plot {run} --held-out {given}/others", capsys)
    assert message.startswith(
        f"held_out must be shards that `remixdit encode` wrote with {tmp_path}/kl"
    )
    network.register_to_config(scaling_factor=0.5)
    network.save_pretrained(tmp_path / "kl")
    remixdit(f"encode {given}/others --output {tmp_path}/scaled {options}")
    assert ShardDataset(tmp_path / "scaled").autoencoder["scaling_factor"] == 0.5
    for line in (
        f"plot {run} --held-out {tmp_path}/scaled",
        f"train tiny --data {tmp_path}/scaled --from {run} --output-dir {tmp_path}/new",
        f"sample {run} --num-images 1 --num-inference-steps 1 --output {tmp_path}/new.png",
    ):
        assert "scaling_factor of " in refusal(line, capsys)
    assert not list(tmp_path.glob("new*"))
