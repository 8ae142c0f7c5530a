"""Directories that diffusers saved, read as models."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from remixdit.interchange import export_diffusers, export_pipeline, import_checkpoint
from remixdit.model import loading
from remixdit.model.describe import describe
from remixdit.model.loading import load_model, stated_config
from remixdit.model.model import RemixDiT
from tests.command_line import refusal, remixdit
from tests.tiny import batch, save_tiny, tiny_dit

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
def their_dit(num_classes: int = 3, **settings) -> DiTTransformer2DModel:
    """A network of diffusers in which no weight is zero."""
    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
    network = DiTTransformer2DModel(
        **{**shape, "in_channels": 4, "out_channels": 8, "norm_eps": 1e-6, **settings},
        num_embeds_ada_norm=num_classes,
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    first = network.transformer_blocks[0].norm1.emb
    for block in network.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first.state_dict())
    return network.eval()


def changed(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def save_pipeline(directory: Path, network: DiTTransformer2DModel, **noise) -> Path:
    vae = save_tiny(directory / "unused")
    pipeline = DiTPipeline(network, vae, DDIMScheduler(**noise))
    pipeline.save_pretrained(directory / "pipeline")
    names = {"0": "cat", "1": "dog, hound", "2": "owl"}  # as in the published pipelines
    changed(directory / "pipeline" / "model_index.json", id2label=names)
    return directory / "pipeline"


def outputs(network: DiTTransformer2DModel, model: RemixDiT) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of diffusers' network and of ours, at all kinds of timesteps and labels."""
    latents, timesteps, labels = batch(model.network)
    timesteps[:3], labels[0] = torch.tensor([0, 1, 999]), model.config.network.num_classes
    with torch.no_grad():
        theirs = network(latents, timestep=timesteps, class_labels=labels).sample
    return model.denoise(latents, timesteps, labels), theirs


@pytest.mark.parametrize(
    ("settings", "saving"),
    [
        ({}, {}),
        ({}, {"max_shard_size": "8KB"}),
        ({"out_channels": 4, "patch_size": 4}, {"safe_serialization": False}),
    ],
)
def test_a_network_of_diffusers_gives_its_own_outputs(settings, saving, tmp_path):
    network = their_dit(**settings)
    network.save_pretrained(tmp_path, **saving)
    torch.testing.assert_close(*outputs(network, load_model(tmp_path)), **CLOSE)
    assert describe(tmp_path)["parameters"]["active"] > 0


def test_a_pipeline_gives_its_outputs_classes_and_autoencoder(tmp_path):
    network = their_dit()
    found = load_model(save_pipeline(tmp_path, network))
    torch.testing.assert_close(*outputs(network, found), **CLOSE)
    assert found.config.class_names == ("cat", "dog, hound", "owl")
    assert found.config.autoencoder["scaling_factor"] == 0.4
    assert Path(found.config.autoencoder["name"], "vae").is_dir()
    line = f"sample {tmp_path}/pipeline --output {tmp_path}/out.npz --num-images 1"
    remixdit(f"{line} --num-inference-steps 2")


def test_the_configuration_of_a_model_of_the_hub_is_that_of_its_download(tmp_path, monkeypatch):
    pipeline = save_pipeline(tmp_path, their_dit())
    monkeypatch.setattr(loading, "download", lambda name: pipeline)
    assert stated_config("owner/name") == stated_config(pipeline) == load_model(pipeline).config


def test_diffusers_default_epsilon_changes_outputs_by_about_a_hundred_thousandth(tmp_path):
    network = their_dit(norm_eps=1e-5)
    network.save_pretrained(tmp_path)
    ours, theirs = outputs(network, load_model(tmp_path))
    assert (ours - theirs).std() < 1e-5 * theirs.std()


def test_the_frequencies_of_the_published_code_are_taken_on_request(tmp_path, caplog):
    from remixdit.interchange.remixdit_transformer import RemixExpertTransformer

    network = their_dit()
    network.save_pretrained(tmp_path)
    model = import_checkpoint(tmp_path, license="mit", num_bases=2, num_experts=3)
    torch.testing.assert_close(*outputs(network, model), **CLOSE)
    assert "fit --timestep-embedding dit" in caplog.text
    published = import_checkpoint(tmp_path, license="mit", timestep_embedding="dit")
    as_trained = RemixExpertTransformer.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(*outputs(as_trained, published), **CLOSE)
    assert not torch.allclose(*outputs(network, published), rtol=1e-2)
    for asked, message in (
        ({"timestep_embedding": "sit"}, "timestep_embedding must be dit or diffusers"),
        ({"timestep_embedding": "cosine"}, "timestep_embedding must be one of dit, diffusers, sit"),
        ({"num_heads": 4}, "num_heads must be that of the directory, 2, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            import_checkpoint(tmp_path, license="mit", **asked)


@pytest.mark.parametrize("kind", ["dit", "diffusers"])
def test_an_export_for_diffusers_comes_back_as_it_was(kind, tmp_path):
    model = RemixDiT.from_dit(
        tiny_dit(timestep_embedding=kind),
        1,
        1,
        prediction_type="v_prediction",
        class_names=("a", "b", "c"),
        license="mit",
    )
    export_diffusers(model, tmp_path / "out")
    code = {path.suffix for path in (tmp_path / "out").iterdir()} & {".py"}
    assert bool(code) == (kind == "dit")
    remixdit(f"import {tmp_path}/out --output {tmp_path}/back")
    back = RemixDiT.from_pretrained(tmp_path / "back")
    assert back.config == model.config
    for name, values in model.weights().items():
        assert torch.equal(back.weights()[name], values), name


def test_formats_whose_readers_embed_timesteps_otherwise_are_refused(tmp_path, capsys):
    their_dit().save_pretrained(tmp_path / "given")
    for name in ("dit", "experts", "pipeline"):
        line = f"export {tmp_path}/given --output {tmp_path}/out --format {name}"
        assert refusal(line, capsys).startswith("timestep_embedding must be dit for this format")
        assert not (tmp_path / "out").exists()


def test_an_exported_pipeline_of_experts_is_not_read_as_a_dit(tmp_path):
    export_pipeline(RemixDiT.from_dit(tiny_dit(), 2, 3), tmp_path / "out")
    with pytest.raises(ValueError, match="_class_name must be that of a DiT"):
        load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("transformer", {"activation_fn": "geglu"}, "activation_fn must be gelu-approximate"),
        ("transformer", {"norm_eps": 1e-3}, "norm_eps must be from 1e-6 to 1e-5"),
        ("transformer", {"_class_name": "UNet2DModel"}, "_class_name must be that of a DiT"),
        ("transformer", {"num_layers": 3}, "checkpoint must hold a DiT, got no transf"),
        ("transformer", {"num_layers": 1}, "checkpoint must hold a DiT alone"),
        ("transformer", {"out_channels": 5}, "out_channels must be 4"),
        ("transformer", {"num_attention_heads": "2"}, "num_attention_heads must be an integer"),
        ("transformer", {"num_layers": 10**9}, "depth of network must be at most 512"),
        ("scheduler", {"num_train_timesteps": 0}, "num_train_timesteps must be at least 1, got 0"),
        ("scheduler", {"beta_schedule": "scaled_linear"}, "betas must be .*scaled_linear"),
    ],
)
def test_what_is_no_dit_of_ours_is_refused(file, change, message, tmp_path):
    pipeline = save_pipeline(tmp_path, their_dit(), beta_schedule="linear")
    name = "scheduler_config.json" if file == "scheduler" else "config.json"
    changed(pipeline / file / name, **change)
    with pytest.raises(ValueError, match=message):
        load_model(pipeline)


def test_blocks_that_embed_timesteps_differently_are_refused(tmp_path):
    network = their_dit()
    with torch.no_grad():
        network.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias.add_(1)
    network.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"linear_1\.bias must be equal in all blocks"):
        load_model(tmp_path)


def test_a_run_starts_from_a_network_of_diffusers(data, tmp_path):
    network = their_dit(in_channels=3, out_channels=6, sample_size=16, patch_size=4)
    network.save_pretrained(tmp_path / "given")
    remixdit(
        f"train tiny --data {data} --from {tmp_path}/given --num-bases 2 --num-experts 3 "
        f"--steps 1 --batch-size 6 --output-dir {tmp_path}/run"
    )
    trained = load_model(tmp_path / "run").config
    assert (trained.network.timestep_embedding, trained.num_bases) == ("diffusers", 2)
