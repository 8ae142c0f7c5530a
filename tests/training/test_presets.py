"""Presets."""

import pytest
import torch

from remixdit.diffusion.dit import SIZES, DiT
from remixdit.training.config import TrainConfig
from remixdit.training.presets import PRESETS, train_config
from tests.command_line import refusal


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_run(name):
    start = "plain" if PRESETS[name].fine_tunes else None
    config = train_config(name, data="photos", output_dir="run", seed=3, init_from=start)
    assert isinstance(config, TrainConfig)
    assert (config.data, config.seed) == ("photos", 3)
    assert PRESETS[name].summary
    assert PRESETS[name].result


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].fine_tunes])
def test_a_preset_that_fine_tunes_needs_a_model(name, capsys):
    message = refusal(f"train {name} --data photos --output-dir run", capsys)
    assert message.startswith(f"--from must name the model that preset {name} fine-tunes, got none")
    with pytest.raises(ValueError, match="--from must name the model"):
        train_config(name, data="photos", output_dir="run")


def test_presets_fine_tune_where_they_say_so():
    assert all(("(--from" in preset.summary) == preset.fine_tunes for preset in PRESETS.values())


def test_sizes_are_the_published_ones():
    millions = {"s2": 33, "b2": 130, "l2": 458, "xl2": 675}  # table 1 of arXiv:2212.09748
    for name, expected in millions.items():
        with torch.device("meta"):
            network = DiT(PRESETS[name].settings["network"])
        assert network.config.depth == SIZES[name[:-1].upper()][0]
        count = sum(parameter.numel() for parameter in network.parameters())
        assert count == pytest.approx(expected * 1e6, rel=0.005)


def test_baselines_differ_from_the_method_by_the_mixture_alone():
    ours = PRESETS["s2"].settings
    for name in ("published", "continued", "independent", "oracle", "raw", "per-block"):
        settings = PRESETS[name].settings
        assert settings["network"] == ours["network"]
        assert settings["optimizer"] == ours["optimizer"]


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="got 'pixel-small'; perhaps pixels-small"):
        train_config("pixel-small", data="photos", output_dir="run")
