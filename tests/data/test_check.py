"""A directory of shards that is not what it says is found out, by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from remixdit.data import EncodeConfig, Report, ShardDataset, encode, open_source
from remixdit.data.check import check as checking
from remixdit.progress import finish


def check(directory: Path) -> Report:
    return finish(checking(directory))


def make(directory: Path, **settings) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    directory.mkdir()
    np.savez(directory / "images.npz", pixels, np.arange(30) % 3)
    config = EncodeConfig(**{"image_size": 16, "shard_size": 8, **settings})
    for _ in encode(open_source(directory / "images.npz"), directory / "out", config):
        pass
    return directory / "out"


@pytest.fixture
def shards(tmp_path) -> Path:
    return make(tmp_path / "made")


def change_index(directory: Path, **changes) -> None:
    index = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps({**index, **changes}))


def test_a_whole_directory_has_no_problems(shards):
    report = check(shards)
    assert (report.problems, report.remarks) == ((), ())
    assert report.class_counts.tolist() == [10, 10, 10, 0]
    assert list(checking(shards)) == [("check", number, 5, "") for number in range(1, 6)]


def test_the_contact_sheet_shows_the_images(shards):
    sheet = np.asarray(check(shards).contact_sheet)
    with np.load(shards.parent / "images.npz") as arrays:
        pixels = arrays["arr_0"]
    assert sheet.shape == (5 * 18, 6 * 18, 3)
    assert np.array_equal(sheet[1:17, 1:17], pixels[0])
    assert np.array_equal(sheet[18 + 1 : 18 + 17, 18 + 1 : 18 + 17], pixels[7])


def test_one_flipped_bit_is_found_and_named(shards):
    content = bytearray((shards / "latents-00002.npy").read_bytes())
    content[1000] ^= 1
    (shards / "latents-00002.npy").write_bytes(content)
    assert check(shards).problems == (
        "latents-00002.npy is damaged: its checksum is not that of the index",
    )


def test_a_missing_shard_is_named(shards):
    (shards / "latents-00001.npy").unlink()
    assert check(shards).problems == ("latents-00001.npy is missing",)


def test_changed_labels_are_found(shards):
    np.save(shards / "class_labels.npy", np.zeros(30, np.int64))
    assert "class_labels.npy is damaged" in check(shards).problems[0]


def test_shards_of_another_encoding_are_named(shards, tmp_path):
    other = make(tmp_path / "other", shard_size=4)
    shutil.copy(other / "latents-00007.npy", shards)
    shutil.copy(other / "latents-00000.npy", shards)
    assert check(shards).problems == (
        "latents-00000.npy is damaged: its checksum is not that of the index",
        "latents-00007.npy belongs to another encoding: the index does not name it",
    )


def test_reading_a_shard_of_another_encoding_is_refused(shards, tmp_path):
    other = make(tmp_path / "other", shard_size=4)
    shutil.copy(other / "latents-00000.npy", shards)
    zeros = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match=r"latents-00000.npy must be \(8, 3, 16, 16\) uint8, got"):
        ShardDataset(shards).read(zeros, zeros, 0)


def test_a_shard_cut_short_is_refused(shards):
    content = (shards / "latents-00000.npy").read_bytes()
    (shards / "latents-00000.npy").write_bytes(content[:-5])
    zeros = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match=r"latents-00000.npy must hold 8 rows"):
        ShardDataset(shards).read(zeros, zeros, 0)


def test_labels_out_of_range_are_found(shards):
    change_index(shards, class_names=["a"], num_classes=1, class_counts=[30])
    assert check(shards).problems == (f"labels of {shards} must lie in [0, 1], got 2",)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff"])
def test_a_broken_index_is_refused(shards, content):
    (shards / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"index.json is no index of shards"):
        ShardDataset(shards)


def test_an_index_of_a_later_format_is_refused(shards):
    change_index(shards, format_version=2)
    with pytest.raises(ValueError, match=r"format_version of .* must be 1, got 2"):
        ShardDataset(shards)


def test_the_histogram_of_many_classes_is_short(tmp_path):
    pixels = np.zeros((150, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", pixels, np.concatenate([np.arange(100), np.zeros(50, np.int64)]))
    for _ in encode(open_source(tmp_path / "a.npz"), tmp_path / "out", EncodeConfig(image_size=8)):
        pass
    lines = check(tmp_path / "out").histogram()
    assert len(lines) == 21
    assert lines[0].split() == ["0", "51", "#" * 40]


def test_a_wrong_scaling_is_remarked_on(tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, latent_channels=2, scaling_factor=1e-3
    ).save_pretrained(tmp_path / "autoencoder")
    shards = make(tmp_path / "made", autoencoder=str(tmp_path / "autoencoder"))
    report = check(shards)
    assert report.problems == ()
    assert report.remarks[0].startswith("the standard deviation of the latents should be near 1")
    assert report.contact_sheet is not None
    shutil.rmtree(tmp_path / "autoencoder")
    report = check(shards)
    assert report.contact_sheet is None
    assert report.remarks[-1].startswith("no contact sheet: autoencoder ")


def test_a_model_of_other_latents_is_refused(shards):
    dataset = ShardDataset(shards)
    dataset.require({"name": "none"}, (3, 16, 16))
    with pytest.raises(
        ValueError, match=r"must be \(4, 32, 32\) for this model, got \(3, 16, 16\)"
    ):
        dataset.require({"name": "none"}, (4, 32, 32))
    with pytest.raises(ValueError, match=r"digest of the autoencoder of .* must be 1234 for this"):
        dataset.require({"name": "kl", "digest": "1234"}, (3, 16, 16))
