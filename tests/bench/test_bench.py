"""The benchmark measures what it says; its numbers are not tested."""

import json
from dataclasses import replace

import pytest
import torch

from remixdit.bench import BenchConfig, Under, bench_sampling, bench_training
from remixdit.bench.config import runs_of
from remixdit.bench.naive import NaiveMixture, naive_gradients
from remixdit.bench.peak import peak_bytes
from remixdit.bench.steps import inputs_of, naive_step, training_of, training_variants
from remixdit.bench.timing import turns
from remixdit.bench.training import extra_bytes, memory_facts
from remixdit.bench.trajectories import NaiveModel
from remixdit.cli.bench import report
from remixdit.cli.main import main
from remixdit.machine import peak_resident_bytes, reset_peak_resident, resident_bytes
from remixdit.training.config import TrainConfig
from remixdit.training.step import gradients
from remixdit.training.trainer import Training
from tests.command_line import remixdit, write_npz

TINY = {
    "network": "16x2/2",
    "input_size": 8,
    "batch_size": 8,
    "num_experts": 5,
    "steps": 2,
    "memory": False,
    "device": "cpu",
}


def perturbed(run: TrainConfig) -> tuple[Training, NaiveMixture]:
    """Return ours and the naive mixture with the same weights, bases that differ."""
    training = training_of(run)
    network = training.model.expert(0)
    naive = NaiveMixture(network, training.model.num_bases, training.model.num_experts)
    generator = torch.Generator().manual_seed(0)
    own = dict(network.named_parameters())
    with torch.no_grad():
        for name, parameter in training.model.network.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            target = naive.logits if name == "experts.logits" else own[name]
            target.copy_(parameter)
    return training, naive


@pytest.mark.parametrize("micro_batch_size", [0, 3])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_naive_gradients_are_those_of_the_mixture(count, micro_batch_size):
    config = BenchConfig(**TINY, experts_per_step=(count,), micro_batch_size=micro_batch_size)
    run = runs_of(config)[f"remix M={count}"]
    training, naive = perturbed(run)
    inputs = inputs_of(training.planner, run, training.device)[0]
    gradients(training.model, training.network, inputs, training.window)
    naive_gradients(naive, training.model.process, inputs, micro_batch_size)
    own = dict(naive.network.named_parameters())
    for name, parameter in training.model.network.named_parameters():
        other = naive.logits if name == "experts.logits" else own[name]
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_training_is_timed_beside_plain_and_naive():
    *progress, result = bench_training(BenchConfig(**TINY, experts_per_step=(0, 1)))
    names = {"plain", "remix M=5", "remix M=1", "naive M=5", "naive M=1"}
    assert set(result["variants"]) == names == set(result["share_of_peak"])
    assert result["variants"]["plain"]["steps"] == 2
    median = {name: facts["median_ms"] for name, facts in result["variants"].items()}
    for name in ("M=5", "M=1"):
        found = result["settings"][name]
        remix = median[f"remix {name}"]
        assert found["remix_over_plain"] == pytest.approx(remix / median["plain"])
        assert found["naive_over_remix"] == pytest.approx(median[f"naive {name}"] / remix)
        assert found["bandwidth_bound_over_plain"] > 1
    for name in ("remix_over_plain", "naive_over_remix"):
        assert result[name] == result["settings"]["M=5"][name]
    assert all(isinstance(part, Under) for part in progress)
    assert [part.done for part in progress] == sorted(part.done for part in progress)
    assert {part.total for part in progress} == {progress[-1].done + 1}


def test_the_naive_variants_run_in_every_third_round_only():
    order = turns(("ours", "naive"), 7, 2, ("naive",))
    assert [turn.number for turn in order if turn.name == "ours"] == list(range(9))
    assert [turn.number for turn in order if turn.name == "naive"] == [0, 2, 5, 8]
    assert sum(turn.is_timed for turn in order) == 7 + 3


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # Dynamo's own
def test_compiled_and_bfloat16_variants_run():
    config = BenchConfig(**TINY, experts_per_step=(2,), precision="bf16", compile=True)
    for build in training_variants(replace(config, recompute=True)).values():
        build()(0)


def test_memory_is_told_by_part_and_traffic_in_bytes():
    config = BenchConfig(**TINY, experts_per_step=(1, 5), naive=False)
    plain, one, every = (memory_facts(run, 10**9) for run in runs_of(config).values())
    assert every["reduced_bytes"] == one["reduced_bytes"] > 3 * plain["reduced_bytes"] / 2
    for facts in (plain, one, every):
        assert sum(facts["memory"].values()) == facts["memory_bytes"]
        assert facts["excess_fraction"] == pytest.approx(1e9 / facts["memory_bytes"] - 1)
    assert every["memory_bytes"] > one["memory_bytes"] > plain["memory_bytes"]
    assert memory_facts(runs_of(config)["plain"], None)["excess_fraction"] is None


def test_mixing_moves_more_the_more_experts_share_a_step():
    config = BenchConfig(**TINY, experts_per_step=(0, 1))
    runs = runs_of(config)
    assert extra_bytes(runs, 5) > extra_bytes(runs, 1) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "remix M=1", "remix M=5"])
def test_the_peak_is_what_is_said_to_be_kept(name):
    config = BenchConfig(network="256x4/2", num_experts=5, experts_per_step=(1, 5))
    run = runs_of(config)[name]
    peak = peak_bytes(config, "train", name)
    assert peak == pytest.approx(sum(memory_facts(run, peak)["memory"].values()), rel=0.15)


def test_the_peak_of_this_process_is_seen_and_begins_anew():
    reset_peak_resident()
    before = peak_resident_bytes()
    values = torch.ones(2**24)
    assert peak_resident_bytes() - before >= values.nbytes
    assert resident_bytes() - before > 0.9 * values.nbytes
    del values
    reset_peak_resident()
    assert peak_resident_bytes() - before < 2**24


def test_sampling_is_timed_beside_plain_and_naive():
    *_, result = bench_sampling(BenchConfig(**TINY, num_inference_steps=3))
    assert set(result["variants"]) == {"plain", "mixed", "precomputed", "naive"}
    assert set(result["settings"]) == {"mixed", "precomputed"}
    for name in ("remix_over_plain", "naive_over_remix"):
        assert result[name] == result["settings"]["mixed"][name] > 0


def test_the_naive_model_answers_with_its_own_experts():
    model = NaiveModel(BenchConfig(**TINY))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.naive.network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    latents, labels = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([1, 2])
    outputs = [model.predict(n, latents, torch.tensor([3, 3]), labels) for n in (0, 4, 0)]
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1])


def test_the_naive_step_trains():
    run = runs_of(BenchConfig(**TINY))["remix M=5"]
    step = naive_step(replace(run, precision="bf16"))
    step(0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"precision": "fp16"}, "precision must be fp32 or bf16, got 'fp16'"),
        ({"experts_per_step": ()}, "experts_per_step must hold at least one number"),
        ({"mixed": "all"}, "naive must be false unless mixed is attention"),
    ],
)
def test_what_cannot_be_measured_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**fields)


@pytest.mark.parametrize("name", ["192/2", "axb/2", "192x4", "192x4x2/2"])
def test_a_misspelt_network_is_refused(name):
    with pytest.raises(ValueError, match="must be"):
        BenchConfig(network=name).shape()


@pytest.mark.parametrize("name", ["XL/2", "dit-xl/2", "S/4"])
def test_published_networks_go_by_their_names(name):
    assert BenchConfig(network=name).shape().depth in (12, 28)


def test_the_command_prints_json(capsys):
    words = "bench train --network 16x2/2 --input-size 8 --batch-size 8 --num-experts 5 --steps 1"
    assert main([*words.split(), "--no-memory", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["M=1"]["naive_over_remix"] > 0
    assert result["variants"]["plain"]["memory"]["activations"] > 0
    report(result, as_json=False)
    printed = capsys.readouterr().out
    assert "parameters 0" in printed
    assert "M=5" in printed


def test_the_loader_is_timed(tmp_path, capsys):
    data = write_npz(tmp_path / "pictures.npz")
    remixdit(f"encode {data} --output {tmp_path}/shards --image-size 16")
    capsys.readouterr()
    remixdit(f"bench data {tmp_path}/shards --batch-size 4 --steps 3 --json")
    result = json.loads(capsys.readouterr().out)
    assert result["bytes_per_second"] == pytest.approx(
        result["latents_per_second"] * 3 * 16 * 16 * 4
    )


def test_an_unknown_benchmark_is_refused(capsys):
    assert main(["bench", "speed"]) == 2
    assert "bench must be train, sample or data, got 'speed'" in capsys.readouterr().err
