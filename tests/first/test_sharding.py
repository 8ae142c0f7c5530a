"""Bases, moments and averages shared out over processes: the same run, a part of the memory."""

import subprocess
import sys
from pathlib import Path

import pytest

from remixdit.model.model import RemixDiT
from remixdit.training.run import read_metrics
from tests.command_line import files_below, remixdit
from tests.processes import OPTIONS, RUNS, assert_close_runs, environment, launch
from tests.tiny import tiny_dit


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A plain model in which all gradients flow, unlike in a new one."""
    directory = tmp_path_factory.mktemp("given") / "model"
    network = tiny_dit(input_size=16, patch_size=4, hidden_size=32, in_channels=3)
    RemixDiT.from_dit(network, 1, 1).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def train(data, given) -> str:
    """The start of the command that trains."""
    return f"train tiny --data {data} --from {given} {OPTIONS}"


@pytest.mark.parametrize(
    "name",
    [
        "all experts at once",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in RUNS
            if name != "all experts at once"
        ),
    ],
)
def test_two_sharded_processes_train_as_one_does(name, train, tmp_path):
    line = f"{train} {RUNS[name]} --output-dir {tmp_path}"
    remixdit(f"{line}/one")
    launch(f"{line}/two --shard")
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    assert files_below(tmp_path / "one") == files_below(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", "--micro-batch-size 2"])
def test_sharded_bfloat16_networks_train_as_whole_ones(options, train, tmp_path):
    line = f"{train} --precision bf16 --mixed all {options} --output-dir {tmp_path}"
    launch(f"{line}/whole")
    launch(f"{line}/sharded --shard")
    losses = [[row["loss"] for row in read_metrics(tmp_path / run)] for run in ("whole", "sharded")]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, "--shard"), (1, "")),
        pytest.param((1, ""), (2, "--shard"), marks=pytest.mark.slow),
        pytest.param((2, ""), (3, "--shard"), marks=pytest.mark.slow),
        pytest.param((2, "--shard"), (2, "--shard"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_goes_on_with_other_slices(first, second, train, tmp_path):
    line = f"{train} --batch-size 12 --experts-per-step 2 --output-dir {tmp_path}"
    launch(f"{line}/whole {second[1]}", second[0])
    launch(f"{line}/parts --steps 3 {first[1]}", first[0])
    launch(f"{line}/parts {second[1]}", second[0])
    assert_close_runs(tmp_path / "whole", tmp_path / "parts")
    if first == second:
        for part in ("model", "ema", "optimizer"):
            name = f"checkpoints/step-00000006/{part}.safetensors"
            whole, parts = ((tmp_path / run / name).read_bytes() for run in ("whole", "parts"))
            assert whole == parts


@pytest.mark.parametrize(
    "name",
    [
        "all experts in turn",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("one expert a step", "all experts at once", "one-hot")
        ),
    ],
)
def test_two_groups_of_two_processes_train_as_one_does(name, train, tmp_path):
    line = f"{train} {RUNS[name]} --output-dir {tmp_path}"
    remixdit(f"{line}/one")
    launch(f"{line}/four --shard --shard-size 2", 4)
    assert_close_runs(tmp_path / "one", tmp_path / "four")
    assert files_below(tmp_path / "one") == files_below(tmp_path / "four")


@pytest.mark.parametrize(
    "second",
    [
        (1, "--shard"),
        *(
            pytest.param(second, marks=pytest.mark.slow)
            for second in ((2, "--shard --shard-size 2"), (4, ""))
        ),
    ],
    ids=str,
)
def test_a_run_of_groups_goes_on_with_other_groups(second, train, tmp_path):
    line = f"{train} --batch-size 12 --experts-per-step 2 --output-dir {tmp_path}"
    launch(f"{line}/whole")
    launch(f"{line}/parts --steps 3 --shard --shard-size 2", 4)
    launch(f"{line}/parts {second[1]}", second[0])
    assert_close_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_groups_that_start_from_a_checkpoint_save_it_again(train, tmp_path):
    line = f"{train} --batch-size 12 --output-dir {tmp_path}"
    launch(f"{line}/whole")
    launch(f"{line}/parts --steps 3")
    launch(f"{line}/parts --shard --shard-size 2", 4)
    assert_close_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--shard-size 2", "shard_size must be 0 without shard, got 2"),
        pytest.param(
            "--shard --shard-size 4",
            "shard_size must divide the 2 processes, got 4",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_groups_that_make_no_sense_are_refused(options, message, data, tmp_path):
    errors = launch(f"train tiny --data {data} --output-dir {tmp_path}/run {options}", code=1)
    assert f"remixdit: error: {message}\n" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sharded_processes_sample_during_training(train, tmp_path):
    options = "--sample-every 3 --sample-images 4 --sample-inference-steps 3"
    line = f"{train} {options} --output-dir {tmp_path}"
    launch(f"{line}/whole")
    launch(f"{line}/sharded --shard")
    assert_close_runs(tmp_path / "whole", tmp_path / "sharded")
    assert (tmp_path / "sharded" / "samples" / "step-00000006.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("options", "factor"), [("--experts-per-step 1", 1), ("", 4)])
def test_sharding_sends_m_gradients(options, factor, data, tmp_path):
    line = f"train tiny --data {data} --mixed all --steps 1 --shard --output-dir {tmp_path}"
    launch(f"{line}/plain --num-bases 1 --num-experts 1")
    launch(f"{line}/remix {options}")
    plain, remix = (read_metrics(tmp_path / run)[-1]["reduced_bytes"] for run in ("plain", "remix"))
    assert 0 <= remix - factor * plain < 1000 * factor


SCRIPT = """
import torch
from remixdit import DiT, DiTConfig, Mixture, distributed
from remixdit.first.optim import MixtureAdamW, OptimizerConfig
from remixdit.first.sharding import Shard

ranks = distributed.start(torch.device("cpu"))
sizes = []
for sharded in (False, True):
    mixture = Mixture(DiT(DiTConfig(input_size=8, hidden_size=64, depth=2, num_heads=2)), 4, 8)
    if sharded:
        mixture.shard(Shard(ranks.rank, ranks.num_ranks))
    optimizer = MixtureAdamW(mixture, OptimizerConfig())
    arrays = [segment.bases for segment in mixture.segments]
    arrays += [*optimizer.exp_avg[:-1], *optimizer.exp_avg_sq[:-1], *optimizer.ema[:-1]]
    sizes.append(sum(array.untyped_storage().nbytes() for array in arrays))
assert sizes[0] > 4_000_000
assert sizes[0] <= sizes[1] * ranks.num_ranks < 1.01 * sizes[0], sizes
distributed.stop()
"""


def test_each_process_keeps_its_part_of_bases_moments_and_averages(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    start = "-m torch.distributed.run --standalone --nproc-per-node 2"
    command = [sys.executable, *start.split(), str(tmp_path / "script.py")]
    subprocess.run(command, check=True, env=environment(), timeout=60)
