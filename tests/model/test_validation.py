"""Model directories that others may have written: one sentence, or a model."""

import copy
import json
import os
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from remixdit import RemixDiT
from remixdit.model.config import RemixConfig, read_config
from remixdit.model.describe import describe
from remixdit.model.loading import load_model
from remixdit.model.state import check_whole, write_state
from tests.command_line import refusal
from tests.tiny import tiny_dit

SECONDS, MEMORY = 10, 2 * 2**30  # what one broken file may take


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model directory that is also a checkpoint, with a table for each block."""
    directory = tmp_path_factory.mktemp("given") / "step-00000007"
    network = tiny_dit(hidden_size=8, depth=1)
    RemixDiT.from_dit(network, 2, 3, per_block=True, class_names=("a", "b", "c")).save_pretrained(
        directory
    )
    for name in ("ema", "optimizer"):
        shutil.copy(directory / "model.safetensors", directory / f"{name}.safetensors")
    write_state(directory, 7, 1)
    return directory


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return JSON values of which the one at a dotted path is another; `...` removes it."""
    values = json.loads(json.dumps(values))
    *parents, name = path.split(".")
    place = values
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[name]
    else:
        place[name] = value
    return values


FIELDS = [
    "num_bases",
    "num_experts",
    "mixed",
    "coefficients",
    "boundaries",
    "prediction_type",
    "num_train_timesteps",
    "rank",
    *(f"network.{name}" for name in ("input_size", "patch_size", "in_channels", "hidden_size")),
    *(f"network.{name}" for name in ("depth", "num_heads", "mlp_ratio", "num_classes")),
    *("network.learn_sigma", "network", "per_block", "class_names", "autoencoder", "license"),
    "autoencoder.name",
]


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_that_is_wrong_is_refused_by_name(path, model):
    given = json.loads((model / "config.json").read_text())
    name = path.split(".")[-1]
    is_number = isinstance(changed(given, path, ...) and value_at(given, path), int | float)
    wrong: list[Any] = [None, 7.5, "x", [], [[]], {"a": 1}, True, -1, 10**30, float("nan")]
    for value in wrong:
        if is_valid(path, value):
            continue
        with pytest.raises(ValueError, match=r"^[^\n]{10,300}$") as caught:
            RemixConfig.from_json(changed(given, path, value))
        assert name in str(caught.value) or not is_number, (value, str(caught.value))


def value_at(values: Any, path: str) -> Any:
    """Return the JSON value at a dotted path."""
    for name in path.split("."):
        values = values[name]
    return values


def is_valid(path: str, value: Any) -> bool:
    """Whether a value that is wrong elsewhere is right for this field."""
    if path in ("network.learn_sigma", "per_block"):
        return value is True
    if path == "network.mlp_ratio":
        return value == 7.5 and value is not True
    if path in ("mixed", "license", "autoencoder.name"):
        return value == "x" or (path == "mixed" and value == [])
    return (path, value) in [("boundaries", None), ("class_names", [])]


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("network.pace", 1, "network must hold known fields only, got 'pace'"),
        ("pace", 1, "config.json must hold known fields only, got 'pace'"),
        ("network.num_heads", ..., "network must state num_heads, got none"),
        ("boundaries", ..., "config.json must state boundaries, got none"),
        ("network.depth", 10**30, "depth of network must be at most 512, got 1000000000000"),
        ("network.input_size", 2**14, "input_size must need a table of at most 33,554,432"),
        ("network.depth", "2", "depth of network must be an integer, got '2'"),
        ("network.depth", -2, "depth must be at least 1, got -2"),
        ("network.mlp_ratio", -1, "mlp_ratio must give a hidden layer, got -1"),
        ("autoencoder", {}, "autoencoder must state its name, got none"),
        ("autoencoder", {"name": 3}, "'name' of autoencoder must be a text, got 3"),
        ("class_names", ["a", 1, "c"], "class_names of config.json must be a list (a text each)"),
        ("boundaries", [0, 500, 400, 1000], "boundaries must rise from 0"),
        ("coefficients", "free", "coefficients must be one of softmax, raw, one_hot, got 'free'"),
        ("mixed", ["*"] * 101, "mixed must be at most 100 patterns"),
    ],
)
def test_a_configuration_is_refused_in_one_sentence(path, value, sentence, model):
    given = json.loads((model / "config.json").read_text())
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        RemixConfig.from_json(changed(given, path, value))
    assert sentence in str(caught.value)


def test_a_network_of_an_earlier_version_embeds_timesteps_as_a_dit(model):
    values = json.loads((model / "config.json").read_text())
    earlier = RemixConfig.from_json(changed(values, "network.timestep_embedding", ...))
    assert earlier == read_config(model)
    with pytest.raises(ValueError, match="timestep_embedding must be one of dit, diffusers, sit"):
        RemixConfig.from_json(changed(values, "network.timestep_embedding", "cosine"))


def test_every_command_refuses_the_same(model, data, tmp_path, capsys):
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    (directory / "state.json").unlink()
    given = json.loads((model / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(changed(given, "network.depth", None)))
    for line in (
        f"info {directory}",
        f"sample {directory} --output {tmp_path}/out.png",
        f"train tiny --data {data} --output-dir {tmp_path}/run --from {directory}",
    ):
        assert refusal(line, capsys) == "depth of network must be an integer, got None"
    (directory / "config.json").write_text('{"network": ' * 100_000)
    assert "must hold a JSON object" in refusal(f"info {directory}", capsys)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_sampled_from(value, model, tmp_path, capsys):
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    (directory / "state.json").unlink()
    weights = load_file(model / "model.safetensors")
    save_file(
        {name: torch.full_like(v, value) for name, v in weights.items()},
        directory / "model.safetensors",
    )
    message = refusal(f"sample {directory} --output {tmp_path}/out.png", capsys)
    assert message.endswith("model.safetensors must be finite, got NaN or infinity")
    assert "must be finite" in refusal(f"info {directory}", capsys)


def header(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """Change the header of a safetensors file."""
    size = struct.unpack("<Q", content[:8])[0]
    values = json.loads(content[8 : 8 + size])
    change(values)
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "a header longer than the file": lambda c: struct.pack("<Q", 2**62) + c[8:],
    "an empty file": lambda c: b"",
    "a header that is no JSON": lambda c: c[:8] + b"[" * 50 + c[58:],
    "overlapping tensors": lambda c: header(
        c,
        lambda h: h["logits"].update(data_offsets=h["bases.blocks.0.mlp.fc1.bias"]["data_offsets"]),
    ),
    "a huge shape": lambda c: header(c, lambda h: h["logits"].update(shape=[2**40, 2**40])),
    "an empty huge shape": lambda c: header(
        c, lambda h: h.update(more={"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]})
    ),
    "another dtype": lambda c: header(c, lambda h: h["logits"].update(dtype="I32")),
    "an unknown dtype": lambda c: header(c, lambda h: h["logits"].update(dtype="F4")),
    "a negative offset": lambda c: header(c, lambda h: h["logits"].update(data_offsets=[-4, 20])),
    "a missing tensor": lambda c: header(c, lambda h: h.pop("logits")),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_lying_header_is_refused(name, model, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    (directory / "state.json").unlink()
    content = (model / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(HEADERS[name](content))
    with pytest.raises(ValueError, match=r"^[^\n]*$"):
        RemixDiT.from_pretrained(directory)
    with pytest.raises(ValueError, match=r"^[^\n]*$"):
        load_model(directory)


VALUES = (None, True, 0, -1, 1, 3, 2**31, 10**40, 1e308, 0.5, "", "x" * 20_000, [], [0], {}, [[]])


def mutated_json(generator: random.Random, text: str) -> str:
    """Change a few values, names or characters of a JSON file."""
    values = json.loads(text)
    for _ in range(generator.randint(1, 3)):
        place = values
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = generator.choice(list(keys))
            if isinstance(place[key], dict | list) and place[key] and generator.random() < 0.7:
                place = place[key]
                continue
            number = place[key]
            if type(number) in (int, float) and generator.random() < 0.5:
                place[key] = generator.choice([number * 2, number - 1, number * 1000, -number])
            elif isinstance(place, dict) and generator.random() < 0.3:
                place[generator.choice(["pace", key.upper()])] = place.pop(key)
            else:
                place[key] = copy.deepcopy(generator.choice(VALUES))
            break
    text = json.dumps(values)
    return (
        mutated_bytes(generator, text.encode()).decode(errors="replace")
        * (generator.random() < 0.2)
        or text
    )


def mutated_bytes(generator: random.Random, content: bytes) -> bytes:
    """Flip bits of a file, or cut, double or fill a part of it."""
    changed = bytearray(content)
    at = generator.randrange(len(changed))
    part = slice(at, at + generator.randint(1, 40))
    way = generator.randrange(5)
    if way == 0:
        changed[at] ^= 1 << generator.randrange(8)
    elif way == 1:
        del changed[at:]
    elif way == 2:
        changed[part] = changed[part] * generator.randint(2, 50)
    elif way == 3:
        changed[part] = generator.randbytes(len(changed[part]))
    else:
        del changed[part]
    return bytes(changed)


def mutated_tensors(generator: random.Random, content: bytes) -> bytes:
    """Change the header of a safetensors file, or any of its bytes."""
    size = struct.unpack("<Q", content[:8])[0]
    if generator.random() < 0.3:
        return mutated_bytes(generator, content)
    text = mutated_json(generator, content[8 : 8 + size].decode()).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def read_all(directory: Path) -> None:
    """Read a directory in every way."""
    for read in (read_config, describe, check_whole, RemixDiT.from_pretrained, load_model):
        try:
            read(directory)
        except (ValueError, OSError) as error:
            if not str(error).isprintable() or len(str(error)) > 1500:
                raise AssertionError(f"{read.__name__} must give one short sentence") from error


def fuzz(model: Path, directory: Path, seconds: float, seed: int) -> int:
    """Read damaged copies of a model for so long; return how many."""
    count, end = 0, time.monotonic() + seconds
    names = ("config.json", "state.json", "model.safetensors", "ema.safetensors")
    shutil.copytree(model, directory, dirs_exist_ok=True)
    while time.monotonic() < end:
        generator = random.Random(f"{seed} {count}")
        name = generator.choice(names)
        content = (model / name).read_bytes()
        if name.endswith(".json"):
            content = mutated_json(generator, content.decode()).encode()
        else:
            content = mutated_tensors(generator, content)
        (directory / name).write_bytes(content)
        started = time.monotonic()
        try:
            read_all(directory)
        except Exception as error:
            raise AssertionError(f"seed {seed}, file {count}, {name}: {content[:600]}") from error
        assert time.monotonic() - started < SECONDS, content[:600]
        shutil.copy(model / name, directory / name)
        count += 1
    return count


def limited_memory(model: Path, directory: Path, seconds: float, seed: int) -> int:
    """Fuzz while the process may take only so much more memory; return how many were read."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        return fuzz(model, directory, seconds, seed)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def test_damaged_files_are_refused_or_read(model, tmp_path):
    assert limited_memory(model, tmp_path / "fuzzed", 4, seed=0) > 5


@pytest.mark.long
@pytest.mark.timeout(900)
def test_damaged_files_are_refused_or_read_for_ten_minutes(model, tmp_path):
    minutes = float(os.environ.get("FUZZ_MINUTES", "10"))
    seed = time.time_ns()
    print(limited_memory(model, tmp_path / "fuzzed", 60 * minutes, seed), "files")
