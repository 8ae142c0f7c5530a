"""Training of low-rank bases on a frozen model."""

import pytest
import torch
from safetensors.torch import load_file

from tests.command_line import refusal, remixdit, save_model
from tests.processes import assert_equal_runs


def test_only_low_rank_bases_are_trained_and_the_run_resumes_exactly(data, tmp_path):
    given = save_model(tmp_path / "given", 0, num_experts=1)
    line = f"train tiny --data {data} --from {given} --rank 2 --log-every 1 --save-every 1"
    remixdit(f"{line} --steps 6 --output-dir {tmp_path}/whole")
    remixdit(f"{line} --steps 3 --output-dir {tmp_path}/parts")
    remixdit(f"{line} --steps 6 --output-dir {tmp_path}/parts")
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts", step=6)

    before = load_file(given / "model.safetensors")
    after = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    frozen = {name for name in after if name.startswith("shared.")}
    for name in frozen:
        plain = before.get(name)
        if plain is None:
            plain = before[f"bases.{name.removeprefix('shared.')}"][0]
        assert torch.equal(after[name], plain), name
    assert all(after[name].abs().sum() > 0 for name in after if name.endswith(".up"))
    moments = load_file(tmp_path / "whole" / "checkpoints" / "step-00000006/optimizer.safetensors")
    trained = {name.partition(".")[2] for name in moments}
    assert trained == {name.removeprefix("bases.") for name in after if name not in frozen}
    remixdit(f"sample {tmp_path}/whole --output {tmp_path}/images.png --num-inference-steps 2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rank 2", "rank must be 0 without a trained model"),
        ("--rank -1", "rank must be at least 0, got -1"),
    ],
)
def test_a_rank_without_a_model_is_refused(options, message, data, tmp_path, capsys):
    line = f"train tiny --data {data} --output-dir {tmp_path}/run {options}"
    assert refusal(line, capsys).startswith(message)
