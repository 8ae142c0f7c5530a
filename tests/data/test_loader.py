"""The stream of batches is a pure function of (seed, step)."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from remixdit.data import Batch, EncodeConfig, Loader, ShardDataset, encode, open_source
from remixdit.data.order import permuted


def only_the_batch(step: int, batch: Batch) -> Batch:
    """Make nothing more of a batch."""
    return batch


def make_shards(directory: Path, num_images: int = 23, **settings) -> ShardDataset:
    """Encode grey images whose first pixel is their own number."""
    pixels = np.random.default_rng(0).integers(0, 256, (num_images, 8, 8), dtype=np.uint8)
    pixels[:, 0, 0] = np.arange(num_images)
    directory.mkdir(parents=True, exist_ok=True)
    np.savez(directory / "images.npz", pixels, np.arange(num_images) % 3)
    source = open_source(directory / "images.npz")
    for _ in encode(source, directory / "shards", EncodeConfig(image_size=8, **settings)):
        pass
    return ShardDataset(directory / "shards")


@pytest.fixture
def dataset(tmp_path) -> ShardDataset:
    return make_shards(tmp_path, shard_size=5)


def numbers_of(latents: torch.Tensor) -> list[int]:
    return ((latents[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.mark.parametrize("num_images", [1, 2, 3, 5, 16, 17, 1000, 12_345])
def test_every_image_appears_once_in_an_epoch(num_images):
    order = permuted(np.arange(num_images), num_images, 7, np.full(num_images, 3))
    assert np.array_equal(np.sort(order), np.arange(num_images))


def test_orders_differ_between_seeds_and_epochs():
    places, zeros = np.arange(1000), np.zeros(1000, np.int64)
    orders = [permuted(places, 1000, seed, zeros + epoch) for seed in (0, 1) for epoch in (0, 1)]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).mean() < 0.02


@pytest.mark.parametrize("num_images", [5, 12, 50])
def test_every_image_is_equally_likely_at_every_place(num_images):
    num_epochs = 4000
    places = np.tile(np.arange(num_images), num_epochs)
    epochs = np.repeat(np.arange(num_epochs), num_images)
    images = permuted(places, num_images, 0, epochs)
    counts = np.zeros((num_images, num_images))
    np.add.at(counts, (places, images), 1)
    expected = num_epochs / num_images
    # chi-square: mean (n - 1)^2, standard deviation sqrt(2) (n - 1)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (num_images - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_in_the_order_are_no_neighbours_in_the_set():
    order = permuted(np.arange(10_000), 10_000, 0, np.zeros(10_000, np.int64))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


def test_the_stream_runs_through_whole_epochs(dataset):
    loader = Loader(dataset, 10)
    stream = [n for step in range(23) for n in numbers_of(loader.batch(step).latents)]
    for epoch in range(10):
        assert sorted(stream[epoch * 23 : epoch * 23 + 23]) == list(range(23))


def test_a_batch_does_not_depend_on_what_was_read_before(dataset):
    batches = Loader(dataset, 4, seed=3, mirror=True).batches(0, only_the_batch)
    unbroken = [batch.latents for batch in itertools.islice(batches, 9)]
    batches.close()
    resumed = Loader(ShardDataset(dataset.directory), 4, seed=3, mirror=True).batches(
        6, only_the_batch
    )
    for expected in unbroken[6:]:
        assert torch.equal(next(resumed).latents, expected)
    resumed.close()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_share_the_batch_of_one_process(dataset, num_ranks):
    whole = Loader(dataset, 12, mirror=True).batch(5)
    shares = [
        Loader(dataset, 12, mirror=True, rank=rank, num_ranks=num_ranks).batch(5)
        for rank in range(num_ranks)
    ]
    assert torch.equal(torch.cat([share.latents for share in shares]), whole.latents)
    assert torch.equal(torch.cat([share.class_labels for share in shares]), whole.class_labels)
    assert torch.cat([share.positions for share in shares]).tolist() == list(range(12))


def test_labels_belong_to_their_images(dataset):
    batch = Loader(dataset, 23).batch(0)
    assert batch.class_labels.tolist() == [n % 3 for n in numbers_of(batch.latents)]


def test_pixels_are_exact(dataset):
    indices = np.array([7, 0, 22])
    latents, _ = dataset.read(indices, np.zeros(3, np.int64), 0)
    with np.load(dataset.directory.parent / "images.npz") as arrays:
        expected = arrays["arr_0"][indices]
    assert latents.dtype == torch.float32
    assert np.array_equal(((latents[:, 0] + 1) * 127.5).round().byte().numpy(), expected)


def test_half_of_the_images_are_mirrored_and_only_on_request(dataset):
    indices = np.zeros(400, np.int64)
    epochs = np.arange(400)
    plain, _ = dataset.read(indices, epochs, 0)
    assert torch.equal(plain, plain[:1].expand_as(plain))
    mirrored, _ = dataset.read(indices, epochs, 0, mirror=True)
    is_flipped = (mirrored == plain.flip(-1)).flatten(1).all(1)
    assert torch.equal(mirrored[~is_flipped], plain[~is_flipped])
    assert 150 < is_flipped.sum() < 250
    again, _ = dataset.read(indices, epochs, 0, mirror=True)
    assert torch.equal(again, mirrored)


def test_a_batch_may_be_larger_than_the_set(dataset):
    assert Loader(dataset, 64).batch(0).latents.shape == (64, 1, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (
            {"batch_size": 7, "num_ranks": 2},
            "batch_size must be a multiple of the 2 processes, got 7",
        ),
    ],
)
def test_a_wrong_batch_size_is_refused(dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        Loader(dataset, **arguments)


def test_an_error_in_a_thread_reaches_the_caller(dataset):
    (dataset.directory / "latents-00002.npy").unlink()
    with pytest.raises(ValueError, match=r"shard .*latents-00002.npy cannot be read"):
        list(itertools.islice(Loader(dataset, 4).batches(0, only_the_batch), 6))
