"""What a run may start from."""

from pathlib import Path

import pytest

from remixdit.model.config import RemixConfig
from remixdit.training.config import MixtureConfig, TrainConfig
from remixdit.training.start import refuse_other_autoencoder, remixed_weights
from tests.tiny import tiny_config, tiny_dit

OWN = {"name": "a", "digest": "1234", "scaling_factor": 0.18215, "shift_factor": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling_factor": 0.5}, "scaling_factor of the data's autoencoder must be .* 0.18215, "),
        ({"digest": "5678"}, "digest of the data's autoencoder must be that of init_from, 1234"),
    ],
)
def test_latents_of_another_autoencoder_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        refuse_other_autoencoder(OWN, {**OWN, **change})


def test_pixels_are_refused_for_a_model_of_latents():
    with pytest.raises(ValueError, match="data must be latents of a, as for init_from, got pixels"):
        refuse_other_autoencoder(OWN, {"name": "none"})


def test_the_same_weights_under_another_name_and_unknown_ones_are_accepted():
    refuse_other_autoencoder(OWN, {**OWN, "name": "elsewhere"})
    refuse_other_autoencoder({"name": "known by name only"}, OWN)


def test_the_start_prefers_own_bases_as_strongly_as_asked():
    weak, strong = (
        MixtureConfig(num_bases=2, num_experts=4, symmetry=value) for value in (0.5, 8.0)
    )
    tables = []
    for mixture in (weak, strong):
        config = TrainConfig(data="", output_dir=Path(), mixture=mixture)
        target = RemixConfig(network=tiny_config(), num_bases=2, num_experts=4)
        weights = dict(remixed_weights(target, tiny_dit(), config))
        tables.append(weights["logits"].softmax(-1))
    assert (tables[0].max(1).values < tables[1].max(1).values).all()
    with pytest.raises(ValueError, match="symmetry must be above 0"):
        MixtureConfig(symmetry=0.0)
    MixtureConfig(symmetry=0.0, prior_strength=1e-4)
