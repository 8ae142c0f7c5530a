"""Nothing comes from the network unless it was asked for, and all of it is checked."""

import time
from pathlib import Path

import huggingface_hub
import pytest
import torch

from remixdit.cli.main import main
from remixdit.data.autoencoder import load_autoencoder
from remixdit.evaluation.features import load_extractor
from remixdit.evaluation.features.inception import INCEPTION_URL
from remixdit.images.hub import is_hub_name
from tests.command_line import refusal
from tests.tiny import save_tiny


def test_weights_of_fid_that_are_already_there_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / INCEPTION_URL.rpartition("/")[2]).write_bytes(b"other weights")
    with pytest.raises(ValueError, match="must be the published file, got another in"):
        load_extractor("inception", weights="download")


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "{}/nothing"])
def test_what_is_no_name_of_the_hub_is_not_looked_up(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("looked up")
    )
    line = f"sample {name.format(tmp_path)} --output {tmp_path}/a.png"
    assert refusal(line, capsys).startswith("model must be a directory or a model of the hub")


@pytest.fixture
def unreachable(tmp_path, monkeypatch) -> Path:
    """A hub that cannot be reached, and the cache beside it."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


NOT_REACHED = (
    "owner/a.name-1 is no local directory, and http://127.0.0.1:9 could not be reached to look "
    "for it: give a local directory, or download it once where there is a network"
)


@pytest.mark.parametrize(
    "line",
    [
        "sample owner/a.name-1 --output {0}/a.png",
        "encode {1} --output {0}/out --image-size 16 --autoencoder owner/a.name-1",
    ],
)
def test_a_hub_that_cannot_be_reached_is_said_at_once(line, data, tmp_path, unreachable, capsys):
    started = time.monotonic()
    assert main(line.format(tmp_path, data).split()) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"remixdit: error: {NOT_REACHED}"
    asked = "remixdit: looking for the autoencoder owner/a.name-1 on the Hugging Face hub"
    assert said[:-1] == ([asked] if "--autoencoder" in line else [])
    assert time.monotonic() - started < 20  # five attempts of diffusers took 23
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["", "vae"])
@pytest.mark.parametrize("safe", [True, False])
def test_an_autoencoder_that_was_downloaded_before_needs_no_hub(
    folder, safe, tmp_path, unreachable
):
    cached = unreachable / "models--owner--a.name-1"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    directory = cached / "snapshots" / ("0" * 40) / folder
    network = save_tiny(directory)
    if not safe:
        (directory / "diffusion_pytorch_model.safetensors").unlink()
        network.save_pretrained(directory, safe_serialization=False)
    found = load_autoencoder("owner/a.name-1")
    save_tiny(tmp_path / "vae")
    assert found.spec == {**load_autoencoder(tmp_path / "vae").spec, "name": "owner/a.name-1"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("black-forest-labs/FLUX.1-dev", True),
        ("owner/name_1.5", True),
        ("facebook/DiT-XL-2-256", True),
        ("./vae", False),
        ("../vae", False),
        ("./owner/vae", False),
        ("owner/", False),
        ("owner", False),
        ("/owner/name", False),
        ("a/b/c", False),
        ("owner/pictures.npz", False),
        ("owner/weights.safetensors", False),
        ("owner/a..b", False),
        ("src/nothing", False),  # in a folder that exists here
    ],
)
def test_a_name_of_the_hub_is_told_apart_from_a_path(name, expected, tmp_path, monkeypatch):
    (tmp_path / "src").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(name) is expected
