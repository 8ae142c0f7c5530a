"""Pixels and latents, against diffusers."""

import pytest
import torch

from remixdit.data.autoencoder import Pixels, load_autoencoder, scale_and_shift
from tests.tiny import save_tiny


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_pixels_decode_to_the_images_they_came_from():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    decoded = load_autoencoder("none").decode(images.float() / 127.5 - 1)
    assert torch.equal(decoded, images.permute(0, 2, 3, 1))


def test_values_out_of_range_are_clipped():
    assert Pixels().decode(torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2)).flatten().tolist() == [
        0,
        255,
    ]


@pytest.mark.parametrize("spec", [None, "none", {"name": "none"}])
def test_no_autoencoder_has_the_shape_of_the_pixels(spec):
    assert load_autoencoder(spec).latent_shape(28, 1) == (1, 28, 28)


def test_moments_are_those_of_diffusers(tmp_path, pixels):
    network = save_tiny(tmp_path)
    moments = load_autoencoder(str(tmp_path)).encode(pixels)
    with torch.no_grad():
        posterior = network.encode(pixels).latent_dist
    mean, logvar = moments.chunk(2, 1)
    # To rounding: on some processors convolutions depend on how the images lie in memory.
    torch.testing.assert_close(mean, posterior.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logvar.clamp(-30, 20), posterior.logvar, rtol=1e-5, atol=1e-5)


def test_decoding_undoes_the_scaling(tmp_path, pixels):
    network = save_tiny(tmp_path, shift_factor=0.1)
    autoencoder = load_autoencoder(str(tmp_path))
    with torch.no_grad():
        latents = network.encode(pixels).latent_dist.mean
        expected = network.decode(latents).sample
    decoded = autoencoder.decode((latents - 0.1) * 0.4)
    expected = ((expected + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    assert decoded.shape == (2, 16, 16, 3)
    assert (decoded.float() - expected).abs().max() <= 1  # rounding of (latents - 0.1) * 0.4


def test_the_spec_comes_from_the_configuration(tmp_path):
    save_tiny(tmp_path, scaling_factor=0.25, shift_factor=0.1)
    spec = load_autoencoder(str(tmp_path)).spec
    assert (spec["scaling_factor"], spec["shift_factor"]) == (0.25, 0.1)
    assert len(spec["digest"]) == 64


def test_statistics_of_each_channel_are_used(tmp_path):
    mean, std = [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 4.0, 8.0]
    save_tiny(tmp_path, scaling_factor=0.5, latents_mean=mean, latents_std=std)
    scale, shift = scale_and_shift(load_autoencoder(str(tmp_path)).spec)
    assert scale.flatten().tolist() == [0.5, 0.25, 0.125, 0.0625]
    assert shift.flatten().tolist() == mean


def test_a_spec_loads_the_same_weights_and_no_others(tmp_path):
    network = save_tiny(tmp_path)
    spec = load_autoencoder(str(tmp_path)).spec
    assert load_autoencoder(spec).spec == spec
    with torch.no_grad():
        network.decoder.conv_out.bias.add_(1)
    network.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"digest of autoencoder .* must be [0-9a-f]+, as its"):
        load_autoencoder(spec)


def test_the_autoencoder_of_a_pipeline_is_found(tmp_path):
    network = save_tiny(tmp_path / "vae")
    assert network.config.latent_channels == load_autoencoder(tmp_path).latent_shape(16, 3)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((15, 3), "image_size must be a multiple of 2 for .*, got 15"),
        ((16, 1), "channels must be 3 for .*, got 1"),
    ],
)
def test_images_that_do_not_fit_are_refused(tmp_path, arguments, message):
    save_tiny(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_autoencoder(str(tmp_path)).latent_shape(*arguments)


def test_what_is_no_autoencoder_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"autoencoder .* cannot be loaded: "):
        load_autoencoder(str(tmp_path))
