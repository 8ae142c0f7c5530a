"""Latents of an AutoencoderKL: encoded, killed, resumed, read back."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from remixdit.data import EncodeConfig, Loader, ShardDataset, encode, open_source
from remixdit.data.autoencoder import load_autoencoder

SCALE, SHIFT = 0.4, 0.1


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
    )
    directory = tmp_path_factory.mktemp("autoencoder")
    network.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    np.savez(path, pixels, np.arange(50) % 2)
    return path


def run(images: Path, output: Path, autoencoder: Path, **settings) -> ShardDataset:
    config = EncodeConfig(
        image_size=16,
        autoencoder=str(autoencoder),
        **{"shard_size": 8, "batch_size": 3, **settings},
    )
    for _ in encode(open_source(images), output, config):
        pass
    return ShardDataset(output)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_moments_are_stored_as_half_floats(images, autoencoder, tmp_path):
    dataset = run(images, tmp_path / "out", autoencoder)
    assert (dataset.shape, dataset.index["shape"]) == ((4, 8, 8), [8, 8, 8])
    assert dataset.autoencoder == load_autoencoder(str(autoencoder)).spec
    with np.load(images) as arrays:
        pixels = torch.from_numpy(arrays["arr_0"][:3]).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = load_autoencoder(str(autoencoder)).encode(pixels).half().numpy()
    assert np.array_equal(dataset.rows(np.arange(3)), expected)


def test_latents_have_the_mean_and_deviation_of_the_posterior(images, autoencoder, tmp_path):
    dataset = run(images, tmp_path / "out", autoencoder)
    draws, _ = dataset.read(np.full(4000, 7), np.arange(4000), 0)
    mean, logvar = torch.from_numpy(dataset.rows(np.array([7]))).float()[0].chunk(2)
    std = (logvar / 2).exp() * SCALE
    assert ((draws.mean(0) - (mean - SHIFT) * SCALE) / std * 4000**0.5).abs().max() < 5
    assert (draws.std(0) / std - 1).abs().max() < 0.06


def test_noise_depends_on_seed_epoch_and_image_alone(images, autoencoder, tmp_path):
    dataset = run(images, tmp_path / "out", autoencoder)

    def one(index: int, epoch: int, seed: int) -> torch.Tensor:
        return dataset.read(np.array([index]), np.array([epoch]), seed)[0][0]

    together, _ = dataset.read(np.array([3, 9, 40]), np.array([0, 2, 1]), 5)
    assert torch.equal(together[1], one(9, 2, 5))
    assert not torch.equal(one(9, 2, 5), one(9, 3, 5))
    assert not torch.equal(one(9, 2, 5), one(9, 2, 6))


def test_mirrored_latents_are_those_of_mirrored_images(images, autoencoder, tmp_path):
    dataset = run(images, tmp_path / "out", autoencoder, mirror=True)
    with np.load(images) as arrays:
        np.savez(tmp_path / "mirrored.npz", arrays["arr_0"][:, :, ::-1], arrays["arr_1"])
    mirrored = run(tmp_path / "mirrored.npz", tmp_path / "mirrored", autoencoder)
    indices = np.arange(50)
    stored = dataset.rows(indices, np.ones(50, bool))
    assert np.array_equal(stored, mirrored.rows(indices))
    epochs = np.zeros(50, np.int64)
    read, _ = dataset.read(indices, epochs, 0, mirror=True)
    plain, _ = dataset.read(indices, epochs, 0)
    flipped, _ = mirrored.read(indices, epochs, 0)
    from_mirror = (read == flipped).flatten(1).all(1)
    assert torch.equal(read[~from_mirror], plain[~from_mirror])
    assert 10 < from_mirror.sum() < 40


def test_mirroring_needs_a_mirrored_copy(images, autoencoder, tmp_path):
    dataset = run(images, tmp_path / "out", autoencoder)
    with pytest.raises(ValueError, match="mirror needs latents of mirrored images"):
        Loader(dataset, 4, mirror=True)


def test_bfloat16_is_close_to_float32(images, autoencoder, tmp_path):
    exact = run(images, tmp_path / "exact", autoencoder).rows(np.arange(50))
    dataset = run(images, tmp_path / "rounded", autoencoder, precision="bf16")
    assert dataset.index["precision"] == "bf16"
    assert np.abs(dataset.rows(np.arange(50)) - exact).max() < 0.05


@pytest.mark.parametrize(
    "other", [{"batch_size": 4}, {"shard_size": 9}, {"mirror": True}, {"precision": "bf16"}]
)
def test_another_encoding_does_not_mix_in(images, autoencoder, tmp_path, other):
    run(images, tmp_path / "out", autoencoder)
    with pytest.raises(ValueError, match="holds another encoding: its"):
        run(images, tmp_path / "out", autoencoder, **other)


DRIVER = """
import os, random, signal, sys, time
import diffusers.models.autoencoders.autoencoder_kl  # once, not in every process
from remixdit.data import EncodeConfig, encode, open_source

images, directory, autoencoder = sys.argv[1:]
config = EncodeConfig(
    image_size=16, autoencoder=autoencoder, shard_size=4, batch_size=1, mirror=True
)

def start(rank, output):
    process = os.fork()
    if process == 0:
        for progress in encode(open_source(images), output, config, rank=rank, num_ranks=2):
            pass
        os._exit(0)
    return process

def run(output, kill_after=None):
    began = time.perf_counter()
    processes = [start(rank, output) for rank in range(2)]
    if kill_after is not None:
        time.sleep(kill_after)
        for process in processes:
            os.kill(process, signal.SIGKILL)
    killed = [os.waitpid(process, 0)[1] != 0 for process in processes]
    return sum(killed), time.perf_counter() - began

num_killed, seconds = run(f"{directory}/unbroken")
assert num_killed == 0
draws = random.Random(0)
num_killed = attempts = 0
while attempts < 20:
    num_killed += run(f"{directory}/killed", kill_after=draws.uniform(0, seconds / 5))[0]
    attempts += 1
assert run(f"{directory}/killed")[0] == 0
print(attempts, num_killed)
"""


def test_an_encoding_killed_at_random_ends_with_the_same_bytes(images, autoencoder, tmp_path):
    shown = subprocess.run(
        [sys.executable, "-c", DRIVER, str(images), str(tmp_path), str(autoencoder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    attempts, num_killed = map(int, shown.stdout.split())
    assert attempts == 20
    assert num_killed >= 10  # of 40 processes; the rest had finished their share
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")
