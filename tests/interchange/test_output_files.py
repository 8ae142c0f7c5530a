"""Files of a model or an export: who may read them, and what their cards state."""

import json
import os
from pathlib import Path

import pytest

from remixdit.data.autoencoder import load_autoencoder
from remixdit.interchange import ImportConfig, run_import
from remixdit.model.card import license_lines
from tests.command_line import remixdit, save_model, write_npz
from tests.tiny import save_tiny


@pytest.fixture
def umask():
    """Let new files be readable by all."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_every_file_can_be_read_by_whom_the_umask_allows(tmp_path, umask):
    save_model(tmp_path / "model", 0)
    for name in ("dit", "diffusers"):
        remixdit(f"export {tmp_path}/model --format {name} --expert 0 --output {tmp_path}/{name}")
    write_npz(tmp_path / "a.npz")
    remixdit(
        f"train tiny --data {tmp_path}/a.npz --steps 1 --batch-size 20 --sample-every 1 "
        f"--sample-inference-steps 2 --output-dir {tmp_path}/run"
    )
    images = f"sample {tmp_path}/run --num-images 2 --num-inference-steps 2 --output {tmp_path}"
    for name in ("a.png", "b.npz", "c"):
        remixdit(f"{images}/{name}")
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(found) > 20
    assert {path.name for path in found if path.stat().st_mode & 0o777 != 0o644} == set()


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("", ""),
        ("apache-2.0", "license: apache-2.0\n"),
        ("CC-BY-NC-4.0", "license: cc-by-nc-4.0\n"),
        ("our own", 'license: other\nlicense_name: "our own"\n'),
        ("x\ntags: [y]", 'license: other\nlicense_name: "x\\ntags: [y]"\n'),
    ],
)
def test_a_card_states_the_licence_as_the_hub_knows_it(name, lines):
    assert license_lines(name) == lines


@pytest.mark.parametrize("spelled", ["vae", "./vae", "../{name}/vae"])
def test_an_autoencoder_is_kept_as_its_resolved_path(spelled, tmp_path, monkeypatch):
    save_tiny(tmp_path / "vae")
    dit = save_model(tmp_path / "plain", 0, num_experts=1)
    remixdit(f"export {dit} --output {tmp_path}/dit")
    monkeypatch.chdir(tmp_path)
    options = ImportConfig(
        source=tmp_path / "dit" / "dit.safetensors",
        output=tmp_path / "model",
        num_heads=2,
        license="mit",
        autoencoder=spelled.format(name=tmp_path.name),
    )
    run_import(options)
    stated = json.loads((tmp_path / "model" / "config.json").read_text())["autoencoder"]
    assert stated == {"name": str(tmp_path / "vae")}
    monkeypatch.chdir("/")
    assert load_autoencoder(stated).spec["name"] == stated["name"]


def test_a_relative_name_of_an_earlier_import_is_the_same_autoencoder(tmp_path, monkeypatch):
    save_tiny(tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    for name in ("vae", "./vae"):
        assert load_autoencoder({"name": name}).spec["name"] == str(Path("vae").resolve())
