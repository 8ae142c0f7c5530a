"""Several processes under torchrun, on the CPU: the same run as one, and no hang when one dies."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from remixdit.model.model import RemixDiT
from remixdit.training.run import read_metrics
from tests.command_line import files_below, remixdit
from tests.processes import (
    OPTIONS,
    RUNS,
    assert_close_runs,
    free_port,
    launch,
    start_host,
)
from tests.tiny import tiny_dit


def long(values: object) -> object:
    """Return parameters of a test that only .ci/long runs."""
    return pytest.param(
        *(values if isinstance(values, tuple) else (values,)), marks=pytest.mark.long
    )


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


def assert_processes_change_nothing(line: str, num_processes: int, directory: Path) -> None:
    """Compare a run of one process with one of several."""
    remixdit(f"{line} --output-dir {directory}/one")
    launch(f"{line} --output-dir {directory}/several", num_processes)
    assert_close_runs(directory / "one", directory / "several")


@pytest.mark.parametrize("name", ["one expert a step", "plain", "muon"])
def test_two_processes_train_as_one_does(name, train, tmp_path):
    assert_processes_change_nothing(f"{train} {RUNS[name]}", 2, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", ["two experts a step"])
def test_four_processes_train_as_one_does(name, train, tmp_path):
    assert_processes_change_nothing(f"{train} {RUNS[name]}", 4, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("options", ["--shard --micro-batch-size 3"])
def test_bfloat16_arithmetic_gives_the_same_to_rounding(options, train, tmp_path):
    line = f"{train} --precision bf16 --mixed all --output-dir {tmp_path}"
    remixdit(f"{line}/one")
    launch(f"{line}/two {options}")
    one, two = ([row["loss"] for row in read_metrics(tmp_path / run)] for run in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=2e-3)


@pytest.mark.parametrize("name", ["all experts a step"])
def test_two_sharded_processes_train_as_one_does(name, train, tmp_path):
    line = f"{train} {RUNS[name]} --output-dir {tmp_path}"
    remixdit(f"{line}/one")
    launch(f"{line}/two --shard")
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    assert files_below(tmp_path / "one") == files_below(tmp_path / "two")


@pytest.mark.parametrize("name", ["all experts in micro-batches"])
def test_two_groups_of_two_processes_train_as_one_does(name, train, tmp_path):
    line = f"{train} {RUNS[name]} --output-dir {tmp_path}"
    remixdit(f"{line}/one")
    launch(f"{line}/four --shard --shard-size 2", 4)
    assert_close_runs(tmp_path / "one", tmp_path / "four")
    assert files_below(tmp_path / "one") == files_below(tmp_path / "four")


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--shard"])
def test_compiled_processes_train_as_one_does(options, train, tmp_path):
    line = f"{train} --experts-per-step 2 --recompute --output-dir {tmp_path}"
    remixdit(f"{line}/one")
    launch(f"{line}/two --compile {options}", limit=280)
    # A compiler orders sums in its own way, and Adam makes full steps of gradients near zero.
    one, two = ([row["loss"] for row in read_metrics(tmp_path / run)] for run in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-4)


# (processes, options) of the first and of the second half of a run
HALVES = [
    ((2, "--shard"), (1, "")),
    long(((4, "--shard --shard-size 2"), (2, ""))),
]


@pytest.mark.parametrize(("first", "second"), HALVES, ids=str)
def test_a_run_goes_on_with_other_processes(first, second, train, tmp_path):
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
    ("options", "message"),
    [
        ("--shard-size 2", "shard_size must be 0 without shard, got 2"),
        long(("--shard --shard-size 4", "shard_size must divide the 2 processes, got 4")),
    ],
)
def test_groups_that_make_no_sense_are_refused(options, message, data, tmp_path):
    errors = launch(f"train tiny --data {data} --output-dir {tmp_path}/run {options}", code=1)
    assert f"remixdit: error: {message}\n" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_sharded_processes_sample_during_training(train, tmp_path):
    options = "--sample-every 3 --sample-images 4 --sample-inference-steps 3"
    line = f"{train} {options} --output-dir {tmp_path}"
    launch(f"{line}/whole")
    launch(f"{line}/sharded --shard")
    assert_close_runs(tmp_path / "whole", tmp_path / "sharded")
    assert (tmp_path / "sharded" / "samples" / "step-00000006.png").is_file()


SCRIPT = """
import torch
from pathlib import Path
from remixdit import DiT, DiTConfig, distributed
from remixdit.data import ShardDataset
from remixdit.training.config import MixtureConfig, OutputConfig, TrainConfig
from remixdit.training.start import outline_of, starting_model
from remixdit.training.trainer import Training

ranks = distributed.start(torch.device("cpu"))
sizes = []
for shard in (False, True):
    config = TrainConfig(
        data="{data}", output_dir=Path("{data}"), batch_size=8, shard=shard,
        network=DiTConfig(hidden_size=64, depth=2, num_heads=2),
        mixture=MixtureConfig(num_bases=4, num_experts=8),
    )
    start = starting_model(config, outline_of(config))
    training = Training(config, start, ShardDataset(config.data), ranks)
    training.take_step(next(training.batches()))
    arrays = [*training.model.network.parameters(), *training.average.values.values()]
    for state in training.optimizer.state.values():
        arrays += [state["exp_avg"], state["exp_avg_sq"]]
    local = [a.to_local() if shard else a for a in arrays]
    sizes.append(sum(a.untyped_storage().nbytes() for a in local))
assert sizes[0] > 4_000_000
assert sizes[0] <= sizes[1] * ranks.num_ranks < 1.02 * sizes[0], sizes
distributed.stop()
"""


def test_each_process_keeps_its_part_of_weights_moments_and_averages(data, tmp_path):
    remixdit(f"encode {data} --output {tmp_path}/shards --image-size 16")
    (tmp_path / "script.py").write_text(SCRIPT.format(data=tmp_path / "shards"))
    launch("", program=f"{tmp_path}/script.py")


AGREE = """
import os, sys, torch
from remixdit import distributed
ranks = distributed.start(torch.device("cpu"))
facts = {{"step": 3, "weights": 7}}
if ranks.rank == 1:
    facts["{name}"] = 4
try:
    distributed.agree(facts)
except ValueError as error:
    assert str(error).startswith("{name} must be the same for all processes, got another on"), error
    print("refused", file=sys.stderr)
distributed.stop()
"""


@pytest.mark.parametrize("name", ["weights"])
def test_processes_that_differ_do_not_begin(name, tmp_path):
    (tmp_path / "script.py").write_text(AGREE.format(name=name))
    assert launch("", program=f"{tmp_path}/script.py").count("refused") == 2


@pytest.mark.long
def test_processes_that_see_other_checkpoints_do_not_train_on_together(train, tmp_path):
    """Each process on a disk of its own: the second one has not got the last checkpoint."""
    run = tmp_path / "run"
    launch(f"{train} --output-dir {run} --steps 4 --save-every 2")
    for rank in (0, 1):
        shutil.copytree(run, tmp_path / str(rank) / "run")
    shutil.rmtree(tmp_path / "1" / "run" / "checkpoints" / "step-00000004")
    script = f"cd {tmp_path}/$RANK && exec {sys.executable} -m remixdit {train} --output-dir run"
    (tmp_path / "start.sh").write_text(script)
    errors = launch("", code=1, program=f"--no-python bash {tmp_path}/start.sh")
    name = "checkpoint to go on from"
    assert f"{name} must be the same for all processes, got another on process 1" in errors


def test_two_processes_encode_and_sample_what_one_does(data, given, tmp_path):
    for name, count in (("one", 1), ("two", 2)):
        launch(f"encode {data} --output {tmp_path}/{name} --image-size 16 --shard-size 5", count)
        sampled = f"sample {given} --output {tmp_path}/{name}-images/ --num-images 6 --batch-size 2"
        launch(f"{sampled} --num-inference-steps 3", count)
    for directories in (("one", "two"), ("one-images", "two-images")):
        one, two = (tmp_path / name for name in directories)
        assert files_below(one) == files_below(two)
        for name in files_below(one):
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batch-size 15", "batch_size must be a multiple of the 2 processes, got 15"),
        pytest.param("--data nowhere", ".*nowhere.*", marks=pytest.mark.long),
        pytest.param("--steps 0", "steps must be at least 1, got 0", marks=pytest.mark.long),
    ],
)
def test_a_wrong_request_ends_in_one_line(options, message, data, tmp_path):
    errors = launch(f"train tiny --data {data} --output-dir {tmp_path}/run {options}", code=1)
    said = [line for line in errors.splitlines() if line.startswith("remixdit")]
    assert len([line for line in said if line != "remixdit FAILED"]) == 1, errors
    assert re.fullmatch(f"remixdit: error: {message}", said[0])
    assert "exitcode  : 2" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_two_hosts_train_as_one_process_does(train, tmp_path):
    port = free_port()
    remixdit(f"{train} --output-dir {tmp_path}/one")
    hosts = [start_host(f"{train} --output-dir {tmp_path}/two", port) for _ in range(2)]
    for host in hosts:
        _, errors = host.communicate(timeout=120)
        assert host.returncode == 0, errors
    assert_close_runs(tmp_path / "one", tmp_path / "two")
