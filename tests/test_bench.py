"""The benchmark measures what it says; its numbers are not tested."""

import json

import pytest
import torch

from remixdit.bench import BenchConfig, bench_sampling, bench_training, naive_step
from remixdit.cli import main
from remixdit.dit import DiT
from remixdit.mixing import Mixture
from remixdit.naive import NaiveMixture
from tests.conftest import batch, tiny_dit

TINY = {"network": "16x2/2", "input_size": 8, "batch_size": 8, "num_experts": 5, "steps": 2}


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


def test_sampling_is_timed_mixed_and_precomputed():
    config = BenchConfig(**TINY, num_inference_steps=3)
    *_, result = bench_sampling(config)
    assert {"remix_over_plain", "precomputed_over_plain"} <= result.keys()


def test_the_naive_step_trains():
    config = BenchConfig(**TINY)
    step = naive_step(config, torch.device("cpu"))
    step(0)


def test_the_command_prints_json(capsys):
    words = "bench train --network 16x2/2 --input-size 8 --batch-size 8 --num-experts 5 --steps 1"
    assert main([*words.split(), "--no-compile", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["remix_over_plain"] > 0


def test_an_unknown_benchmark_is_refused(capsys):
    assert main(["bench", "speed"]) == 2
    assert "bench must be of train, sample or data, got 'speed'" in capsys.readouterr().err
