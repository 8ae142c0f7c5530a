"""A SiT becomes a DiT of flow matching with equal outputs."""

import argparse

import pytest
import torch
from torch import Tensor

from remixdit.diffusion.dit import DiT
from remixdit.interchange import export_dit, import_checkpoint
from remixdit.interchange.sit import kind_of_weights, refuse_other_path
from remixdit.model.model import RemixDiT
from tests.command_line import refusal, remixdit
from tests.tiny import batch, tiny_dit

MIT = {"num_heads": 2, "license": "mit"}


@torch.no_grad()
def sit(learn_sigma: bool = True, channels: int = 3) -> DiT:
    """The blocks of a SiT are those of a DiT; what nothing trains is zero."""
    network = tiny_dit(learn_sigma=learn_sigma, in_channels=channels).eval()
    if learn_sigma:
        for parameter in network.final_layer.linear.parameters():
            parameter.unflatten(0, (-1, 2 * channels))[:, channels:] = 0
    return network


@torch.no_grad()
def velocity(network: DiT, latents: Tensor, times: Tensor, labels: Tensor) -> Tensor:
    """data - noise at times in [0, 1], 0 for noise: they are embedded as they are."""
    return network(latents, times, labels)[:, : latents.shape[1]]


def saved(network: DiT, path) -> str:
    state = {name: values.clone() for name, values in network.state_dict().items()}
    torch.save({"ema": {**state, "pos_embed": network.pos_embed}, "opt": {}}, path)
    return str(path)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_outputs_are_the_velocity_turned_round_at_the_time_turned_round(learn_sigma, tmp_path):
    network = sit(learn_sigma)
    asked = {} if learn_sigma else {"timestep_embedding": "sit"}
    model = import_checkpoint(saved(network, tmp_path / "given.pt"), **MIT, **asked)
    assert model.config.is_flow
    assert model.config.network.learn_sigma is False
    latents, _, labels = batch(network)
    times = torch.tensor([0.0, 1.0, 0.5, 0.001, 0.9, 0.3])
    expected = -velocity(network, latents, 1 - times, labels)
    torch.testing.assert_close(
        model.denoise(latents, times, labels), expected, rtol=1e-5, atol=1e-5
    )


def test_integrating_either_way_round_gives_the_same_images(tmp_path):
    network = sit()
    model = import_checkpoint(saved(network, tmp_path / "given.pt"), **MIT)
    noise, _, labels = batch(network)
    theirs, ours, steps = noise, noise, 8
    for step in range(steps):  # Euler: theirs from 0 up to 1, ours from 1 down to 0
        times = torch.full((len(noise),), step / steps)
        theirs = theirs + velocity(network, theirs, times, labels) / steps
        ours = ours - model.denoise(ours, 1 - times, labels) / steps
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_sit_is_told_apart_by_its_weights():
    assert kind_of_weights(sit().state_dict()) == "sit"
    assert kind_of_weights(tiny_dit(in_channels=3).state_dict()) == "dit"
    for untold in (
        tiny_dit(learn_sigma=False, in_channels=3).state_dict(),
        DiT(sit().config).state_dict(),  # untrained: all of its outputs are zero
        {},
    ):
        assert kind_of_weights(untold) is None


@pytest.mark.parametrize(
    ("network", "name", "arguments", "said"),
    [
        (tiny_dit(in_channels=3), "SiT-B-2.pt", {}, "its name of a SiT, its weights of a DiT"),
        (sit(), "DiT-B-2.pt", {}, "its name of a DiT, its weights of a SiT"),
        (
            tiny_dit(in_channels=3),
            "0400000.pt",
            {"path_type": "Linear"},
            "its arguments of a SiT, its weights of a DiT",
        ),
        (
            sit(learn_sigma=False),
            "SiT-B-2.pt",
            {"model": "DiT-B/2"},
            "its arguments of a DiT, its name of a SiT",
        ),
    ],
)
def test_a_name_that_the_weights_or_the_arguments_contradict_is_asked_about(
    network, name, arguments, said, tmp_path, capsys
):
    content = {"ema": network.state_dict(), "args": argparse.Namespace(**arguments)}
    torch.save(content, tmp_path / name)
    line = f"import {tmp_path}/{name} --output {tmp_path}/out --num-heads 2 --license mit"
    line += " --input-size 8"
    assert refusal(line, capsys) == (
        f"timestep_embedding must be given for {name} (--timestep-embedding sit or dit), got none: "
        f"{said}"
    )
    assert not (tmp_path / "out").exists()
    remixdit(f"{line} --timestep-embedding dit")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SiT-XL-2-256x256.pt", {}),
        ("0400000.pt", {"model": "SiT-B/2"}),
        ("0400000.pt", {"model": "mine", "prediction": "velocity"}),
        ("0400000.pt", {"path_type": "Linear"}),
    ],
)
@pytest.mark.parametrize("kind", [argparse.Namespace, dict])
def test_a_sit_is_told_apart_by_its_name_or_its_arguments(kind, name, arguments, tmp_path):
    weights = sit(learn_sigma=False).state_dict()
    content = {"ema": weights, "model": weights, "args": kind(lr=1e-4, **arguments)}
    torch.save(content if arguments else weights, tmp_path / name)
    facts = {**MIT, "input_size": 8}
    config = import_checkpoint(tmp_path / name, **facts).config
    assert (config.is_flow, config.network.timestep_embedding) == (True, "sit")
    asked = import_checkpoint(tmp_path / name, timestep_embedding="dit", **facts).config
    assert (asked.is_flow, asked.network.timestep_embedding) == (False, "dit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path_type": "GVP", "prediction": "velocity"}, "path_type must be Linear"),
        ({"path_type": "Linear", "prediction": "noise"}, "prediction must be velocity"),
        ({"prediction": "score"}, "prediction must be velocity"),
    ],
)
def test_a_file_of_another_path_or_prediction_is_refused(arguments, message, tmp_path, capsys):
    content = {"ema": sit().state_dict(), "args": argparse.Namespace(**arguments)}
    torch.save(content, tmp_path / "0400000.pt")
    line = f"import {tmp_path}/0400000.pt --output {tmp_path}/out --num-heads 2 --license mit"
    assert refusal(f"{line} --input-size 8", capsys).startswith(message)
    assert not (tmp_path / "out").exists()


def test_an_export_of_ours_is_no_sit_whatever_its_name_is(tmp_path):
    model = RemixDiT.from_dit(sit(), 1, 1, license="mit")  # no variance is learned yet
    exported = export_dit(model, tmp_path / "out").rename(tmp_path / "SiT.safetensors")
    assert import_checkpoint(exported).config == model.config


@pytest.mark.parametrize("stated", [{"path_type": "GVP"}, {"prediction": "score"}])
def test_another_path_or_prediction_is_refused(stated):
    refuse_other_path({"path_type": "Linear", "prediction": "velocity", "model": "SiT-XL/2"})
    with pytest.raises(ValueError, match=f"{next(iter(stated))} must be .* to import a SiT"):
        refuse_other_path(stated)


def test_the_command_imports_a_sit_which_no_format_of_a_dit_takes(tmp_path, capsys):
    given = saved(sit(), tmp_path / "given.pt")
    options = "--num-heads 2 --license mit --num-bases 2 --num-experts 3"
    remixdit(f"import {given} --output {tmp_path}/model {options}")
    model = RemixDiT.from_pretrained(tmp_path / "model")
    assert (model.num_experts, model.config.network.timestep_embedding) == (3, "sit")
    line = f"sample {tmp_path}/model --output {tmp_path}/out.npz --num-images 1"
    remixdit(f"{line} --num-inference-steps 2")
    for name in ("dit --expert 0", "experts", "diffusers --expert 0", "pipeline"):
        line = f"export {tmp_path}/model --output {tmp_path}/out --format {name}"
        assert refusal(line, capsys).startswith("timestep_embedding must be dit")
