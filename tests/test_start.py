"""What a run may start from."""

import pytest

from remixdit.start import refuse_other_autoencoder

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
