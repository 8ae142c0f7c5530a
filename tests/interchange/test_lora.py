"""LoRA files of low-rank experts, added by hand to diffusers' DiT."""

import json

import pytest
import torch
from safetensors.torch import load_file

from remixdit.diffusion.dit import DiT
from remixdit.interchange import ExportConfig, export_diffusers, export_lora, run_export
from remixdit.interchange.exporting import diffusers_config, diffusers_state
from remixdit.interchange.remixdit_transformer import RemixExpertTransformer
from remixdit.model.model import RemixDiT
from tests.tiny import batch, tiny_dit


@torch.no_grad()
def low_rank(mixed: str) -> tuple[DiT, RemixDiT]:
    """Return a network, and a model that was trained on top of it."""
    network = tiny_dit()
    model = RemixDiT.from_dit(network, 2, 4, rank=3, mixed=mixed).eval()
    for name, bases in model.experts.bases().items():
        if name.endswith(".up"):
            bases.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return network, model


@pytest.mark.parametrize("mixed", ["attention+mlp", "all"])
@torch.no_grad()
def test_a_lora_file_on_the_frozen_network_is_the_expert(mixed, tmp_path):
    network, model = low_rank(mixed)
    model.save_pretrained(tmp_path / "model")
    output = tmp_path / "out"
    run_export(ExportConfig(checkpoint=str(tmp_path / "model"), output=output, format="lora"))
    about = json.loads((output / "experts.json").read_text())
    assert [(e["begin"], e["end"]) for e in about["experts"]] == [
        (0, 250),
        (250, 500),
        (500, 750),
        (750, 1000),
    ]
    latents, timesteps, labels = batch(network)
    for expert, entry in enumerate(about["experts"]):
        theirs = RemixExpertTransformer(**diffusers_config(network)).eval()
        theirs.load_state_dict(diffusers_state(network))
        weights = load_file(output / entry["file"])
        for name in [n for n in weights if n.endswith("lora_A.weight")]:
            low = weights[name]
            assert len(low) == about["rank"] == about["lora_alpha"] == 6
            layer = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            parameter = theirs.get_submodule(layer).weight
            parameter += weights[name.replace("lora_A", "lora_B")] @ low
        expected = model.experts.plain(expert).eval()(latents, timesteps, labels)
        found = theirs(latents, timestep=timesteps, class_labels=labels).sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(network.eval()(latents, timesteps, labels), expected, atol=0.01)


@torch.no_grad()
def test_diffusers_loads_the_lora_file_of_an_expert(tmp_path):
    pytest.importorskip("peft", reason="reads LoRA files for diffusers")
    network, model = low_rank("all")
    export_lora(model, tmp_path / "loras")
    export_diffusers(RemixDiT.from_dit(network, 1, 1), tmp_path / "frozen")
    theirs = RemixExpertTransformer.from_pretrained(tmp_path / "frozen").eval()
    latents, timesteps, labels = batch(network)
    for expert, follows in ((3, False), (1, True)):  # as a trajectory goes from one to the next
        file = f"expert-{expert:03d}.safetensors"
        theirs.load_lora_adapter(
            tmp_path / "loras", weight_name=file, adapter_name="expert", hotswap=follows
        )
        found = theirs(latents, timestep=timesteps, class_labels=labels).sample
        expected = model.experts.plain(expert).eval()(latents, timesteps, labels)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_whole_bases_are_refused_as_lora(tmp_path):
    with pytest.raises(ValueError, match="rank must be at least 1 for format lora, got 0"):
        export_lora(RemixDiT.from_dit(tiny_dit(), 2, 4), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_timesteps_of_a_sit_are_refused_as_lora(tmp_path):
    network = tiny_dit(learn_sigma=False, timestep_embedding="sit")
    model = RemixDiT.from_dit(network, 2, 4, rank=1, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="timestep_embedding must be dit or diffusers"):
        export_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
