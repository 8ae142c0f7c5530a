"""Runs whose bases are several given networks."""

import re

import pytest
import torch
from safetensors.torch import load_file

from remixdit.data import EncodeConfig, ShardDataset, prepare
from remixdit.distributed import Ranks
from remixdit.mixture.coefficients import initial_table
from remixdit.model.loading import load_model
from remixdit.model.model import RemixDiT
from remixdit.progress import finish
from remixdit.training.config import MixtureConfig
from remixdit.training.presets import train_config
from remixdit.training.start import Outline, outline_of, starting_model
from remixdit.training.trainer import Training
from tests.command_line import refusal, remixdit, save_model
from tests.processes import assert_equal_runs
from tests.tiny import tiny_dit


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> list[str]:
    """Three plain models that differ in every parameter."""
    root = tmp_path_factory.mktemp("networks")
    return [str(save_model(root / f"{n}", n, num_experts=1)) for n in range(3)]


def line(data, run, networks, options="") -> str:
    short = "--log-every 1 --save-every 1 --batch-size 8"
    given = " ".join(networks)
    return f"train tiny --data {data} --output-dir {run} --from {given} {short} {options}"


def test_given_networks_are_the_bases_and_coefficients_alone_are_learned(data, networks, tmp_path):
    options = "--num-experts 5 --train coefficients --coefficients-learning-rate 0.1"
    remixdit(line(data, tmp_path / "run", networks, f"{options} --steps 3"))
    model = load_model(tmp_path / "run")
    assert (model.num_bases, model.num_experts, model.config.mixed) == (3, 5, "all")
    given = [load_file(f"{name}/model.safetensors") for name in networks]
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    table = initial_table(3, 5, "softmax", 8.0)
    assert (weights.pop("logits") - table).abs().max() > 0.01
    for name, bases in weights.items():
        plain = name.removeprefix("bases.")
        for basis, state in zip(bases, given, strict=True):
            found = state.get(f"shared.{plain}")
            own = state[f"bases.{plain}"][0] if found is None else found
            assert torch.equal(basis, own), name
    moments = load_file(tmp_path / "run" / "checkpoints" / "step-00000003/optimizer.safetensors")
    assert set(moments) == {"exp_avg.logits", "exp_avg_sq.logits"}


def test_frozen_bases_have_neither_gradients_nor_moments_nor_averages(data, networks, tmp_path):
    finish(prepare(str(data), tmp_path / "shards", EncodeConfig(image_size=16)))
    config = train_config(
        "tiny",
        data=tmp_path / "shards",
        output_dir=tmp_path / "run",
        init_from=networks[0],
        further_bases=tuple(networks[1:]),
        train="coefficients",
        mixture=MixtureConfig(num_bases=3, num_experts=4, mixed="all"),
    )
    start = starting_model(config, outline_of(config))
    training = Training(config, start, ShardDataset(tmp_path / "shards"), Ranks())
    training.take_step(next(iter(training.batches())))
    logits = training.model.experts.logits
    assert list(training.optimizer.state) == [logits]
    assert list(training.average.values) == ["experts.logits"]
    trained = [p for p in training.model.network.parameters() if p.requires_grad]
    assert trained == [logits]


def test_a_run_from_several_networks_resumes_without_them(data, tmp_path):
    networks = [str(save_model(tmp_path / f"given{n}", n, num_experts=1)) for n in range(2)]
    remixdit(line(data, tmp_path / "whole", networks, "--num-experts 3 --steps 4"))
    parts = line(data, tmp_path / "parts", networks, "--num-experts 3 --steps")
    remixdit(f"{parts} 2")
    for name in networks:
        (tmp_path / name).rename(f"{name}-moved")
    remixdit(f"{parts} 4")
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts", step=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num-bases 2", "num_bases must be the number of networks of --from, 3, got 2"),
        ("--mixed attention+mlp", "mixed must match .*, in which the networks of --from differ"),
        ("--rank 2", "rank must be 0 with several networks of --from, got 2"),
        ("--train logits", "train must be all or coefficients, got 'logits'"),
        ("--train coefficients --coefficients one_hot", "train must be all without bases"),
        ("--train coefficients --new-labels", "train must be all with --new-labels"),
    ],
)
def test_options_that_several_networks_contradict_are_refused(
    options, message, data, networks, tmp_path, capsys
):
    told = refusal(line(data, tmp_path / "run", networks, options), capsys)
    assert re.match(message, told), told
    assert not (tmp_path / "run").exists()


def test_a_network_of_another_shape_is_named(data, networks, tmp_path, capsys):
    other = save_model(tmp_path / "other", 5, num_experts=1, prediction_type="v_prediction")
    told = refusal(line(data, tmp_path / "run", [*networks[:2], str(other)]), capsys)
    assert told == (
        f"prediction_type of {other} must be epsilon, as for {networks[0]}, got v_prediction"
    )
    mixture = save_model(tmp_path / "mixture", 6)
    told = refusal(line(data, tmp_path / "run", [*networks[:2], str(mixture)]), capsys)
    assert told.startswith(f"num_experts of {mixture} must be 1, a plain DiT, got 5")


def test_classes_of_every_network_are_matched_to_the_data_by_name(tmp_path):
    names = [(), ("b", "a", "c")]
    for number, known in enumerate(names):
        model = RemixDiT.from_dit(tiny_dit(seed=number), 1, 1, class_names=known)
        model.save_pretrained(tmp_path / str(number))
    config = train_config(
        "tiny",
        data="not read",
        output_dir=tmp_path / "run",
        init_from=str(tmp_path / "0"),
        further_bases=(str(tmp_path / "1"),),
        mixture=MixtureConfig(num_bases=2, num_experts=2, mixed="all"),
    )
    shape = (tiny_dit().config.in_channels, 8, 8)
    start = starting_model(config, Outline(shape, ("a", "b", "c"), {"name": "none"}))
    table = dict(start.weights())["bases.y_embedder.embedding_table.weight"]
    for number, rows in enumerate([[0, 1, 2, 3], [1, 0, 2, 3]]):
        given = tiny_dit(seed=number).y_embedder.embedding_table.weight
        assert torch.equal(table[number], given[rows])


def test_coefficients_of_copies_are_not_trained_alone(data, networks, tmp_path, capsys):
    told = refusal(line(data, tmp_path / "run", networks[:1], "--train coefficients"), capsys)
    assert told.startswith("train must be all for bases that begin as copies of one network")


def test_coefficients_of_a_mixture_are_trained_alone(data, tmp_path):
    given = save_model(tmp_path / "given", 0, num_experts=5)
    options = "--num-bases 2 --num-experts 5 --intervals uniform --train coefficients --steps 1"
    remixdit(line(data, tmp_path / "run", [str(given)], options))
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("given", "run/model")
    )
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"logits"}
