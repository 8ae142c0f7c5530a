"""What a run says of its training."""

import pytest

from remixdit.model.loading import find_model
from remixdit.training.facts import training_facts
from tests.command_line import remixdit

OPTIMIZERS = {
    "--learning-rate 1e-3": "AdamW, learning rate 0.001",
    "--algorithm muon --learning-rate 4e-3": (
        "Muon, learning rate 0.004, AdamW for the rest, a quarter of it"
    ),
    "--algorithm muon --learning-rate 4e-3 --adamw-learning-rate 2e-3": (
        "Muon, learning rate 0.004, AdamW for the rest, 0.002"
    ),
}


@pytest.mark.parametrize(("options", "expected"), OPTIMIZERS.items())
def test_the_optimizer_and_its_rates_are_said(data, tmp_path, options, expected):
    line = f"train tiny --data {data} --steps 1 --log-every 1 --output-dir {tmp_path}/run"
    remixdit(f"{line} {options}")
    said = training_facts(find_model(tmp_path / "run"))["optimizer"]
    assert said.startswith(f"{expected}, precision ")
