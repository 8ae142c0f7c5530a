"""What a run may start from."""

from pathlib import Path

import pytest

from remixdit.model.config import RemixConfig
from remixdit.training.config import MixtureConfig, TrainConfig
from remixdit.training.start import remixed_weights
from tests.tiny import tiny_config, tiny_dit


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


def test_copies_share_more_at_the_start_than_networks_that_differ():
    assert 0 < MixtureConfig().symmetry_of(1) < MixtureConfig().symmetry_of(4)
    given = MixtureConfig(symmetry=3.0)
    assert given.symmetry_of(1) == given.symmetry_of(4) == 3.0
