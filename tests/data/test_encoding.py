"""Encoding images into shards: what is written, what is skipped, what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from remixdit.cli.main import main
from remixdit.data import EncodeConfig, ShardDataset, encode, open_source
from remixdit.data.encoding import _precision
from remixdit.data.prepare import prepare as preparation
from remixdit.progress import finish


def make_folder(root: Path, num_images: int = 5, side: int = 16) -> Path:
    draws = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for number in range(num_images):
            pixels = draws.integers(0, 256, (side, side + number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def run(source: Path, output: Path, **settings) -> ShardDataset:
    finish(encode(open_source(source), output, EncodeConfig(**{"image_size": 16, **settings})))
    return ShardDataset(output)


def prepare(source: Path, cache: Path, config: EncodeConfig) -> ShardDataset:
    return finish(preparation(source, cache, config))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_pixels_are_those_of_the_source(tmp_path):
    root = make_folder(tmp_path / "photos")
    dataset = run(root, tmp_path / "out", shard_size=4)
    assert (len(dataset), dataset.shape, dataset.class_names) == (10, (3, 16, 16), ("cat", "dog"))
    assert dataset.class_labels.tolist() == [0] * 5 + [1] * 5
    stored = dataset.rows(np.arange(10))
    pixels = np.asarray(Image.open(root / "cat" / "0.png"))
    assert np.array_equal(stored[0], pixels.transpose(2, 0, 1))


def test_the_directory_holds_what_it_says(tmp_path):
    run(make_folder(tmp_path / "photos"), tmp_path / "out", shard_size=4)
    shards = ["latents-00000.npy", "latents-00001.npy", "latents-00002.npy"]
    assert sorted(contents(tmp_path / "out")) == ["class_labels.npy", "index.json", *shards]
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["class_counts"] == [5, 5]
    assert [shard["num_images"] for shard in index["shards"]] == [4, 4, 2]


def test_progress_counts_up_to_the_end(tmp_path):
    source = open_source(make_folder(tmp_path / "photos"))
    config = EncodeConfig(image_size=16, shard_size=4, batch_size=3)
    done = [progress.done for progress in encode(source, tmp_path / "out", config)]
    assert done == [0, 3, 4, 7, 8, 10]
    assert list(encode(source, tmp_path / "out", config)) == [("encode", 10, 10, "")]
    assert finish(encode(source, tmp_path / "out", config)) == (10, 0)


def test_processes_that_share_the_work_write_the_same_bytes(tmp_path):
    source = open_source(make_folder(tmp_path / "photos"))
    config = EncodeConfig(image_size=16, shard_size=2)
    list(encode(source, tmp_path / "one", config))
    for rank in (2, 0, 1):
        assert not (tmp_path / "three" / "index.json").exists()
        list(encode(source, tmp_path / "three", config, rank=rank, num_ranks=3))
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_an_abandoned_encoding_continues(tmp_path):
    source = open_source(make_folder(tmp_path / "photos"))
    config = EncodeConfig(image_size=16, shard_size=2, batch_size=1)
    list(encode(source, tmp_path / "unbroken", config))
    progress = encode(source, tmp_path / "broken", config)
    for _ in range(6):
        next(progress)
    progress.close()
    kept = sorted(path.name for path in (tmp_path / "broken").glob("*.npy"))
    assert kept == ["latents-00000.npy", "latents-00001.npy"]
    list(encode(source, tmp_path / "broken", config))
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


def test_shards_that_are_there_count_before_the_first_batch(tmp_path):
    source = open_source(make_folder(tmp_path / "photos"))
    config = EncodeConfig(image_size=16, shard_size=2)
    list(encode(source, tmp_path / "out", config, rank=1, num_ranks=2))
    done = [progress.done for progress in encode(source, tmp_path / "out", config)]
    assert done == [4, 6, 8, 10]


def test_unlabelled_images_carry_the_null_label(tmp_path):
    make_folder(tmp_path / "photos")
    dataset = run(tmp_path / "photos" / "cat", tmp_path / "out")
    assert (dataset.num_classes, set(dataset.class_labels.tolist())) == (0, {0})


def test_grey_images_keep_one_channel_unless_asked(tmp_path):
    np.savez(tmp_path / "a.npz", np.full((3, 16, 16), 7, np.uint8))
    assert run(tmp_path / "a.npz", tmp_path / "grey").shape == (1, 16, 16)
    assert run(tmp_path / "a.npz", tmp_path / "rgb", channels=3).shape == (3, 16, 16)
    colour = make_folder(tmp_path / "photos")
    assert run(colour, tmp_path / "asked", channels=1).shape == (1, 16, 16)


def test_a_coloured_image_among_grey_ones_is_not_silently_greyed(tmp_path):
    for number in range(200):
        image = Image.new("L", (16, 16), number)
        image.save(tmp_path / f"{number:03d}.png")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "001.png")
    with pytest.raises(ValueError, match=r"001.png is in colour and others are grey"):
        run(tmp_path, tmp_path / "out")


def test_training_encodes_a_source_once(tmp_path):
    root = make_folder(tmp_path / "photos")
    config = EncodeConfig(image_size=16)
    *_, last = preparation(root, tmp_path / "cache", config)
    assert last == ("encode", 10, 10, "")
    first = prepare(root, tmp_path / "cache", config)
    assert len(first) == 10
    assert prepare(root, tmp_path / "cache", config).digest == first.digest
    assert prepare(tmp_path / "cache", tmp_path / "unused", config).digest == first.digest
    assert not (tmp_path / "unused").exists()


def test_a_cache_of_another_encoding_is_refused(tmp_path):
    root = make_folder(tmp_path / "photos")
    prepare(root, tmp_path / "cache", EncodeConfig(image_size=16))
    with pytest.raises(ValueError, match="another encoding: its image_size is 16, not 32"):
        prepare(root, tmp_path / "cache", EncodeConfig(image_size=32))
    (root / "cat" / "0.png").unlink()
    with pytest.raises(ValueError, match="another encoding: its source is"):
        prepare(root, tmp_path / "cache", EncodeConfig(image_size=16))


def test_a_missing_shard_is_found_before_training(tmp_path):
    root, config = make_folder(tmp_path / "photos"), EncodeConfig(image_size=16, shard_size=4)
    prepare(root, tmp_path / "cache", config)
    (tmp_path / "cache" / "latents-00002.npy").unlink()
    for source in (root, tmp_path / "cache"):
        with pytest.raises(
            ValueError, match=r"shard .*latents-00002.npy cannot be read: .*No such"
        ):
            prepare(source, tmp_path / "cache", config)


def test_a_foreign_directory_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    np.save(tmp_path / "out" / "thesis.npy", np.zeros(3))
    with pytest.raises(ValueError, match="out exists and is no encoding"):
        run(make_folder(tmp_path / "photos"), tmp_path / "out")
    assert list(contents(tmp_path / "out")) == ["thesis.npy"]


def test_an_unfinished_encoding_of_something_else_is_left_alone(tmp_path):
    source = open_source(make_folder(tmp_path / "photos"))
    progress = encode(source, tmp_path / "out", EncodeConfig(image_size=16, shard_size=2))
    for _ in range(2):
        next(progress)
    progress.close()
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="another encoding: its image_size is 16, not 32"):
        run(tmp_path / "photos", tmp_path / "out", image_size=32)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 4}, "image_size must be at least 8, got 4"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"crop": "middle"}, "crop must be center or random, got 'middle'"),
        ({"device": "gpu"}, "device must be auto, cpu or cuda, got 'gpu'"),
        ({"precision": "fp16"}, "precision must be auto, fp32 or bf16, got 'fp16'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"mirror": True}, "pixels are mirrored when they are read"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EncodeConfig(**{"image_size": 16, **settings})


def test_a_directory_without_an_index_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no index.json: it is no finished encoding"):
        ShardDataset(tmp_path)


def test_encoding_is_float32_on_every_device_unless_asked():
    for device in ("auto", "cpu", "cuda"):
        config = EncodeConfig(image_size=16, autoencoder="vae", device=device)
        assert _precision(config) == "fp32"


def start_encoder(line: str, gate: int) -> int:
    """Fork an encoder that begins when the gate is closed; its exit code is the command's."""
    child = os.fork()
    if not child:
        os.read(gate, 1)
        os._exit(main(line.split()))
    return child


def test_of_two_encoders_of_other_settings_one_is_refused(tmp_path, capfd):
    root = make_folder(tmp_path / "photos", num_images=1)
    for attempt in range(10):
        output = tmp_path / str(attempt)
        gate, opener = os.pipe()
        line = f"encode {root} --output {output} --image-size"
        children = [start_encoder(f"{line} {size}", gate) for size in (16, 24)]
        for _ in children:
            os.write(opener, b" ")
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        os.close(gate)
        os.close(opener)
        assert sorted(codes) == [0, 2]
        kept, lost = (16, 24) if codes == [0, 2] else (24, 16)
        assert ShardDataset(output).index["image_size"] == kept
        message = f"output {output} holds another encoding: its image_size is {kept}, not {lost}"
        assert message in capfd.readouterr().err
        assert len(contents(output)) == 3  # one shard, its labels and the index
