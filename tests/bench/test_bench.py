"""The benchmark measures what it says; its numbers are not tested."""

import json

import pytest
import torch

from remixdit.bench import BenchConfig, bench_sampling, bench_training
from remixdit.bench.naive import NaiveMixture
from remixdit.bench.peak import peak_bytes
from remixdit.bench.steps import NaiveModel, naive_step, run_of
from remixdit.bench.training import floor_bytes, memory_facts
from remixdit.cli.main import main
from remixdit.diffusion.dit import DiT
from remixdit.first.mixing import Mixture
from remixdit.machine import peak_resident_bytes, reset_peak_resident, resident_bytes
from tests.command_line import remixdit, write_npz
from tests.tiny import batch, tiny_dit

TINY = {
    "network": "16x2/2",
    "input_size": 8,
    "batch_size": 8,
    "num_experts": 5,
    "steps": 2,
    "memory": False,
}


def test_the_naive_reference_computes_what_the_mixture_does():
    network, reference = tiny_dit(), tiny_dit()
    mixture = Mixture(network, 3, 5)
    naive = NaiveMixture(reference, 3, 5)
    naive.logits.data.copy_(mixture.logits.data)
    naive.expert = 2
    inputs = batch(network)
    mixture.activate(2)
    expected = network(*inputs)
    found = naive.network(*inputs)
    torch.testing.assert_close(found, expected)
    torch.autograd.backward(found.square().mean())
    naive.update()
    assert isinstance(naive.network, DiT)


def test_training_is_timed_beside_plain_and_naive():
    config = BenchConfig(**TINY, experts_per_step=(1, 5), compile=False)
    *_, result = bench_training(config)
    assert set(result["variants"]) == {"plain", "remix M=1", "remix M=5", "naive"}
    assert result["variants"]["plain"]["steps"] == 2
    plain = result["variants"]["plain"]["median_ms"]
    remix = result["variants"]["remix M=1"]["median_ms"]
    assert result["remix_over_plain"] == pytest.approx(remix / plain)
    assert result["floor_over_plain"] > 1
    assert result["naive_over_remix"] > 0
    assert set(result["share_of_peak"]) == set(result["variants"])


def test_memory_is_told_by_part_and_traffic_in_bytes():
    config = BenchConfig(**TINY, experts_per_step=(1, 5), compile=False, naive=False)
    plain, one, all_experts = (memory_facts(run, 10**9) for run in run_of(config).values())
    assert one["reduced_bytes"] == plain["reduced_bytes"]
    assert all_experts["reduced_bytes"] > 3 * plain["reduced_bytes"] / 2
    for facts in (plain, one):
        assert sum(facts["memory"].values()) == facts["needed_bytes"]
        assert facts["excess_fraction"] == pytest.approx(1e9 / facts["needed_bytes"] - 1)
    # A stack of M networks is more than the method needs.
    assert sum(all_experts["memory"].values()) > all_experts["needed_bytes"] > one["needed_bytes"]
    assert memory_facts(run_of(config)["plain"], None)["excess_fraction"] is None


def test_the_floor_is_what_k_bases_move_beyond_one():
    config = BenchConfig(**TINY)
    # qkv, proj, fc1 and fc2 of two blocks, each weight and bias padded to 64 numbers
    mixed = 2 * (768 + 64 + 256 + 64 + 1024 + 64 + 1024 + 64)
    assert floor_bytes(config) == pytest.approx(4 * mixed * (8 * 3 + 2 * 4 + 1), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "remix M=1", "remix M=5"])
def test_the_peak_is_what_is_said_to_be_kept(name):
    config = BenchConfig(network="256x4/2", compile=False, num_experts=5, experts_per_step=(1, 5))
    run = run_of(config)[name]
    peak = peak_bytes(config, "train", name)
    assert peak == pytest.approx(sum(memory_facts(run, peak)["memory"].values()), rel=0.1)


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
    config = BenchConfig(**TINY, num_inference_steps=3)
    *_, result = bench_sampling(config)
    assert set(result["variants"]) == {"plain", "mixed", "precomputed", "naive"}
    assert {"remix_over_plain", "precomputed_over_plain", "naive_over_remix"} <= result.keys()


def test_the_naive_model_answers_with_its_own_experts():
    model = NaiveModel(BenchConfig(**TINY))
    with torch.no_grad():
        model.naive.logits.copy_(torch.eye(5, 4) * 20)
        for parameter in model.naive_network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        latents, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
        outputs = [model.predict(n, latents, torch.tensor([3, 3]), labels) for n in (0, 1, 0)]
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1])


def test_the_naive_step_trains():
    config = BenchConfig(**TINY)
    step = naive_step(config, torch.device("cpu"))
    step(0)


def test_the_command_prints_json(capsys):
    words = "bench train --network 16x2/2 --input-size 8 --batch-size 8 --num-experts 5 --steps 1"
    assert main([*words.split(), "--no-compile", "--no-memory", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["remix_over_plain"] > 0
    assert result["variants"]["plain"]["memory"]["activations"] > 0
    assert main([*words.split(), "--no-compile", "--no-memory"]) == 0
    assert "bases 0" in capsys.readouterr().out


def test_the_loader_is_timed(tmp_path, capsys):
    data = write_npz(tmp_path / "pictures.npz")
    remixdit(f"encode {data} --output {tmp_path}/shards --image-size 16")
    remixdit(f"bench data {tmp_path}/shards --batch-size 4 --steps 3 --json")
    result = json.loads(capsys.readouterr().out)
    assert result["bytes_per_second"] == pytest.approx(
        result["latents_per_second"] * 3 * 16 * 16 * 4
    )


def test_an_unknown_benchmark_is_refused(capsys):
    assert main(["bench", "speed"]) == 2
    assert "bench must be of train, sample or data, got 'speed'" in capsys.readouterr().err
