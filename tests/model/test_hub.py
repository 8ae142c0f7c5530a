"""Models go to the hub and come back, through a stand-in for its HTTP interface."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load_file

from remixdit.model.card import model_card
from remixdit.model.config import RemixConfig
from tests.command_line import refusal, remixdit, save_model
from tests.stand_in_hub import Hub, stand_in_hub
from tests.tiny import tiny_config


@pytest.fixture
def hub():
    with stand_in_hub() as server:
        yield server


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A run of four steps."""
    directory = tmp_path_factory.mktemp("hub") / "run"
    remixdit(
        f"train tiny --data {data} --output-dir {directory} --steps 4 --save-every 2 "
        "--log-every 1 --no-tensorboard"
    )
    return directory


def call(hub: Hub, words: list[str], cache: Path, code: int = 0, **changes: str) -> str:
    """Run Python in a process for which the stand-in is the hub; return its last line."""
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **hub.environment(cache), **changes},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return (done.stderr.splitlines() or [""])[-1]


def command(line: str) -> list[str]:
    """Return the words of a command for `call`."""
    return ["-m", "remixdit", *line.split()]


def test_a_pushed_run_draws_the_images_of_the_run(hub, run, tmp_path):
    said = call(hub, command(f"push {run} me/cats"), tmp_path / "first")
    assert said.endswith(" sample me/cats --output images.png")
    stored = hub.repositories["me/cats"]
    assert not stored.private
    assert set(stored.files) == {
        "config.json",
        "model.safetensors",
        "README.md",
        "coefficients.png",
    }
    newest = run / "checkpoints" / "step-00000004"
    assert stored.files["model.safetensors"] == (newest / "ema.safetensors").read_bytes()
    stored.files |= {"pytorch_model.bin": b"a pickle", "code.py": b"code"}
    hub.requests.clear()
    options = "--num-images 2 --num-inference-steps 2 --output"
    call(hub, command(f"sample me/cats {options} {tmp_path}/theirs.npz"), tmp_path / "empty")
    assert not any("pytorch_model" in request or "code" in request for request in hub.requests)
    remixdit(f"sample {run} {options} {tmp_path}/ours.npz")
    theirs, ours = (np.load(tmp_path / f"{name}.npz") for name in ("theirs", "ours"))
    np.testing.assert_array_equal(theirs["arr_0"], ours["arr_0"])
    call(hub, command("info me/cats"), tmp_path / "empty")


def test_the_card_of_a_run_states_data_budget_and_loss(hub, run, tmp_path):
    call(hub, command(f"push {run} me/cats --private"), tmp_path)
    stored = hub.repositories["me/cats"]
    assert stored.private
    card = stored.files["README.md"].decode()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "pictures.npz, 24 images" in card
    assert str(run.parent) not in card
    assert "4 steps of 16 images, 64 images in all" in card
    assert f"{rows[-1]['loss']:.4f}, mean over the metrics of steps 4 to 4" in card
    assert 'RemixDiT.from_pretrained("me/cats")' in card
    assert "![" in card
    with Image.open(io.BytesIO(stored.files["coefficients.png"])) as picture:
        assert picture.width > 300


def test_an_export_goes_up_as_it_is_under_its_new_name(hub, tmp_path):
    model = save_model(tmp_path / "model", 0)
    remixdit(f"export {model} --format pipeline --output {tmp_path}/pipeline")
    (tmp_path / "pipeline" / "secret.txt").write_text("mine")
    call(hub, command(f"push {tmp_path}/pipeline me/pipe"), tmp_path / "cache")
    files = hub.repositories["me/pipe"].files
    paths = (path for path in (tmp_path / "pipeline").rglob("*") if path.is_file())
    written = {path.relative_to(tmp_path / "pipeline").as_posix(): path for path in paths}
    assert set(files) == set(written) - {"secret.txt"}
    assert 'from_pretrained("me/pipe", trust_remote_code=True)' in files["README.md"].decode()
    assert all(files[name] == written[name].read_bytes() for name in set(files) - {"README.md"})


def test_a_model_pushed_from_python_keeps_the_card_that_its_owner_wrote(hub, tmp_path):
    save_model(tmp_path / "model", 0)
    script = "from remixdit import RemixDiT as R\nR.from_pretrained({!r}).push_to_hub('me/a')"
    call(hub, ["-c", script.format(str(tmp_path / "model"))], tmp_path / "cache")
    (tmp_path / "sent").write_bytes(hub.repositories["me/a"].files["model.safetensors"])
    sent, own = load_file(tmp_path / "sent"), load_file(tmp_path / "model" / "model.safetensors")
    assert sent.keys() == own.keys()
    assert all(torch.equal(sent[name], own[name]) for name in own)
    (tmp_path / "model" / "README.md").write_text('---\ntags: []\n---\n"this directory" is mine')
    call(hub, command(f"push {tmp_path}/model me/b"), tmp_path / "cache")
    assert hub.repositories["me/b"].files["README.md"] == b'---\ntags: []\n---\n"me/b" is mine'


def test_weights_that_only_an_earlier_diffusers_wrote_are_downloaded(hub, tmp_path):
    model = save_model(tmp_path / "model", 0, num_experts=1)
    remixdit(f"export {model} --format diffusers --output {tmp_path}/plain")
    weights = tmp_path / "plain" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    call(hub, command(f"push {tmp_path}/plain me/old"), tmp_path / "cache")
    stored = hub.repositories["me/old"].files
    stored["diffusion_pytorch_model.bin"] = weights.with_suffix(".bin").read_bytes()
    stored["training_args.bin"] = b"a pickle"
    call(hub, command("info me/old"), tmp_path / "cache")
    fetched = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert fetched == {
        *("README.md", "config.json", "remixdit.json", "diffusion_pytorch_model.bin")
    }


@pytest.mark.parametrize(
    ("changes", "broken", "message"),
    [
        ({"HF_TOKEN": "hf_other"}, {}, "the hub refuses the token (401); log in with `hf auth"),
        ({}, {"/lfs/": 403}, "the hub refuses the token (403); log in with `hf auth login`"),
        ({}, {"/create": 500}, "the hub answers 500; give the same command again later"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {}, "http://127.0.0.1:9 cannot be reached; check"),
    ],
)
def test_a_hub_that_does_not_take_it_is_one_sentence(changes, broken, message, hub, run, tmp_path):
    hub.broken = broken
    said = call(hub, command(f"push {run} me/cats"), tmp_path, code=1, **changes)
    assert said.startswith(f"remixdit: error: me/cats cannot be uploaded: {message}")


def test_nothing_private_goes_to_a_model_that_everybody_sees(hub, run, tmp_path):
    call(hub, command(f"push {run} me/cats"), tmp_path)
    before = dict(hub.repositories["me/cats"].files)
    said = call(hub, command(f"push {run} me/cats --private --no-ema"), tmp_path, code=2)
    assert said.endswith("me/cats must be private with --private, but it is there as public")
    assert hub.repositories["me/cats"].files == before


def test_without_a_token_nothing_is_asked_of_the_hub(hub, run, tmp_path):
    said = call(hub, command(f"push {run} me/cats"), tmp_path, code=2, HF_TOKEN="")
    assert "a token of the Hugging Face Hub must be known to upload, got none" in said
    assert hub.requests == []


@pytest.mark.parametrize("name", ["cats", "me/my/cats", "me/ca ts", "me/ca--ts", "me/.cats", "/a"])
def test_a_name_that_the_hub_cannot_have_is_refused_first(name, capsys):
    capsys.readouterr()
    message = refusal_of(["push", "/nowhere", name], capsys)
    assert message.startswith(f"name must be owner/name on the hub, got {name!r}: ")


def refusal_of(words: list[str], capsys) -> str:
    from remixdit.cli.main import main

    assert main(words) == 2
    return capsys.readouterr().err.removeprefix("remixdit: error: ")


def test_a_damaged_checkpoint_is_not_pushed(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    assert refusal(f"push {tmp_path}/nowhere me/a", capsys).startswith("checkpoint must be a dir")
    other = tmp_path / "step-00000004"
    other.mkdir()
    for path in (run / "checkpoints" / "step-00000004").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    weights = bytearray((other / "ema.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "ema.safetensors").write_bytes(weights)
    assert "it is damaged" in refusal(f"push {other} me/a", capsys)


HOSTILE = (
    "<script>alert(1)</script>",
    "a | b\n\n# heading",
    "![x](http://a.b/c.png) [y](http://a.b) www.a.com me@a.com `code` **bold** $x$",
)


def test_names_of_others_are_text_in_the_card_and_its_header():
    network = replace(tiny_config(), num_classes=3)
    config = RemixConfig(
        network=network, class_names=HOSTILE, license="x\n---\ntags: [y]", num_bases=1
    )
    card = model_card(config, "me/cats", {"images": "<b>cats</b>|dogs"})
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "remixdit",
        "tags": ["diffusion", "remix-dit"],
        "license": "other",
        "license_name": config.license,
    }
    page = MarkdownIt("commonmark").enable("table").render(text)
    shown = unescape(re.sub(r"<[^>]*>", "", page))
    for name in (*HOSTILE, "<b>cats</b>|dogs"):
        assert name.replace("\n", r"\n") in shown
    assert re.findall('(?:href|src)="([^"]*)"', page) == [
        "https://github.com/remixdit/remixdit",
        "https://arxiv.org/abs/2412.05628",
    ]
    assert not {"<script", "<b>", "<strong", "<h1>heading"} & set(re.findall("<[^ >]*>?", page))


def test_a_card_names_no_folder_of_this_machine():
    config = RemixConfig(network=tiny_config(), autoencoder={"name": "/home/alice/vae"})
    card = model_card(config)
    assert "alice" not in card
    assert "autoencoder vae |" in card
    assert "20, for intervals 50 wide of the timesteps 0 to 1000" in card
