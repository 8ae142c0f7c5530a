"""The network against the published one, and in every shape that users ask for."""

from dataclasses import replace

import pytest
import torch

from remixdit.diffusion.dit import DiT, DiTConfig, sincos_positions
from tests.tiny import batch, published_dit, tiny_config, tiny_dit


def test_output_equals_the_published_dit(given, settings):
    network = published_dit(given, settings)
    with torch.no_grad():
        output = network(given["dit.latents"], given["dit.timesteps"], given["dit.class_labels"])
    torch.testing.assert_close(output, given["dit.output"], rtol=1e-4, atol=1e-5)


def test_positions_equal_the_published_table(given):
    torch.testing.assert_close(sincos_positions(32, 4)[None], given["dit.weights.pos_embed"])


def test_parameters_carry_the_published_names_and_shapes(given, settings):
    network = published_dit(given, settings)
    ours = {name: value.shape for name, value in network.state_dict().items()}
    published = {n[12:]: v.shape for n, v in given.items() if n.startswith("dit.weights.")}
    published.pop("pos_embed")
    assert ours == published


@pytest.mark.parametrize(
    ("name", "millions"),  # table 4 of arXiv:2212.09748
    [("DiT-S/2", 33), ("DiT-B/2", 130), ("L/2", 458), ("XL/2", 675), ("s/8", 33)],
)
def test_named_sizes_have_the_published_number_of_parameters(name, millions):
    config = DiTConfig.named(name)
    shallow = (DiT(replace(config, depth=depth)) for depth in (1, 2))
    one, two = (sum(p.numel() for p in network.parameters()) for network in shallow)
    assert (one + (two - one) * (config.depth - 1)) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("in_channels", [1, 3, 4])
def test_any_shape_runs(patch_size, learn_sigma, in_channels):
    network = tiny_dit(
        input_size=16, patch_size=patch_size, learn_sigma=learn_sigma, in_channels=in_channels
    )
    latents, timesteps, class_labels = batch(network)
    output = network(latents, timesteps, class_labels)
    assert output.shape == (6, in_channels * (1 + learn_sigma), 16, 16)
    assert output.dtype == torch.float32


def test_a_new_network_predicts_zero():
    network = DiT(tiny_config())
    assert network(*batch(network)).abs().max() == 0


def test_an_unconditional_network_needs_no_labels():
    network = tiny_dit(num_classes=0)
    latents, timesteps, _ = batch(tiny_dit())
    assert torch.equal(network(latents, timesteps), network(latents, timesteps, None))


def test_labels_are_asked_for_where_they_are_needed():
    network = tiny_dit()
    latents, timesteps, _ = batch(network)
    with pytest.raises(ValueError, match="class_labels are needed by 3 classes"):
        network(latents, timesteps)


def test_float_timesteps_are_integers_where_they_agree_and_between_otherwise():
    network = tiny_dit()
    latents, timesteps, class_labels = batch(network)
    whole = network(latents, timesteps, class_labels)
    assert torch.equal(network(latents, timesteps.float(), class_labels), whole)
    assert not torch.allclose(network(latents, timesteps + 0.5, class_labels), whole)


def test_patches_return_to_where_they_came_from():
    network = tiny_dit(input_size=8, patch_size=2, learn_sigma=False)
    image = torch.arange(64.0).view(1, 1, 8, 8)
    patches = torch.nn.functional.unfold(image, 2, stride=2).transpose(1, 2)  # (1, T, 4)
    assert torch.equal(network.unpatchify(patches), image)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = DiT(tiny_config(), seed=5)
    torch.manual_seed(2)
    second = DiT(tiny_config(), seed=5)
    other = DiT(tiny_config(), seed=6)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.x_embedder.proj.weight, other.x_embedder.proj.weight)


def test_attention_in_bfloat16_agrees_with_float32():
    network = tiny_dit()
    inputs = batch(network)
    expected = network(*inputs)
    for block in network.blocks:
        block.to(torch.bfloat16)
    network.x_embedder.to(torch.bfloat16)
    assert (network(*inputs) - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 3}, "patch_size must divide input_size 8, got 3"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"hidden_size": 18, "num_heads": 2}, "hidden_size must be a multiple of 4"),
        ({"num_heads": 3}, "hidden_size must be a multiple of 4 and of num_heads 3, got 16"),
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
    ],
)
def test_impossible_shapes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="name must be a size of S, B, L, XL"):
        DiTConfig.named("DiT-Q/2")
