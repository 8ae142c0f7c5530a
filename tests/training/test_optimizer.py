"""The update of a step: torch's AdamW, clipping, the prior, the average."""

import pytest
import torch

from remixdit.mixture.remix import remix
from remixdit.training.average import Average, lerp_if
from remixdit.training.config import MixtureConfig
from remixdit.training.optimizer import (
    OptimizerConfig,
    clip,
    gradients_of_logits,
    optimizer_of,
    set_learning_rates,
    step_if,
)
from tests.tiny import batch, perturb, tiny_dit


def weights_of(experts):
    """Return bases and shared parameters."""
    return [p for p in experts.network.parameters() if p is not experts.logits]


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
@pytest.mark.parametrize("mixed", ["attention+mlp", "all"])
def test_one_basis_is_plain_training_bit_for_bit(mixed, max_grad_norm):
    plain, network = tiny_dit(), tiny_dit()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    experts = remix(network, 1, 1, mixed=mixed)
    optimizer = optimizer_of(experts, OptimizerConfig(learning_rate=1e-2, weight_decay=0.1))
    for step in range(5):
        for each in (plain, network):
            torch.autograd.backward(each(*batch(each, seed=step)).square().mean())
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm)
            clip(weights_of(experts), experts.logits, max_grad_norm)
        for each in (reference, optimizer):
            each.step()
            each.zero_grad()
    named = dict(network.named_parameters())
    for name, expected in plain.named_parameters():
        if max_grad_norm:  # a norm of norms, in another order of the parameters
            torch.testing.assert_close(named[name].squeeze(0), expected, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(named[name].view_as(expected), expected), name


RATES = {"learning_rate": 1e-3, "coefficients_learning_rate": 1e-2}
KINDS_OF_RATES = [
    # options, and the rates of mixed matrices and biases, shared matrices and biases
    ({}, (1e-3, 1e-3, 1e-3, 1e-3)),
    ({"shared_learning_rate": 1e-4}, (1e-3, 1e-3, 1e-4, 1e-4)),
    ({"algorithm": "muon"}, (1e-3, 2.5e-4, 1e-3, 2.5e-4)),
    ({"algorithm": "muon", "adamw_learning_rate": 2e-4}, (1e-3, 2e-4, 1e-3, 2e-4)),
    ({"algorithm": "muon", "shared_learning_rate": 1e-4}, (1e-3, 2.5e-4, 1e-4, 1e-4)),
]


@pytest.mark.parametrize(("options", "rates"), KINDS_OF_RATES)
def test_each_kind_of_parameter_has_its_learning_rate(options, rates):
    network = tiny_dit()
    experts = remix(network, 2, 4, mixed="*blocks.*.mlp.*")  # attention is shared
    optimizer = optimizer_of(experts, OptimizerConfig(**RATES, **options))
    set_learning_rates(optimizer, 0.5)
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: found[id(p)] for name, p in network.named_parameters()}
    assert len(found) == len(named)
    kinds = ("mlp.fc1.weight", "mlp.fc1.bias", "attn.proj.weight", "attn.proj.bias")
    assert [named[f"blocks.0.{kind}"] for kind in kinds] == [rate / 2 for rate in rates]
    # What is neither attention nor MLP is adamw's.
    assert named["blocks.0.adaLN_modulation.1.weight"] == rates[3] / 2
    assert named["experts.logits"] == 5e-3


def test_frozen_coefficients_are_not_trained():
    experts = remix(tiny_dit(), 2, 4, coefficients="one_hot")
    trained = [
        p for g in optimizer_of(experts, OptimizerConfig()).param_groups for p in g["params"]
    ]
    assert not any(parameter is experts.logits for parameter in trained)
    assert len(trained) == len(weights_of(experts))


def test_a_rate_that_adamw_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"adamw_learning_rate must be left out .* got 0\.001"):
        OptimizerConfig(algorithm="adamw", adamw_learning_rate=1e-3)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_skipped_step_changes_no_weight_moment_or_count(max_grad_norm):
    """And good steps around it are those of the stock optimizer, bit for bit."""
    network, reference = tiny_dit(), tiny_dit()
    experts, theirs = (remix(each, 3, 5) for each in (network, reference))
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    ours, stock = optimizer_of(experts, config), optimizer_of(theirs, config)
    for step, factor in enumerate((1.0, float("nan"), 1.0, float("inf"), 1.0)):
        for each, optimizer in ((experts, ours), (theirs, stock)):
            with each.route([0, 1, 2, 3, 4, 4]):
                output = each.network(*batch(each.network, seed=step))
            torch.autograd.backward(output.square().mean() * factor)
            norm = clip(weights_of(each), each.logits, max_grad_norm)
            if optimizer is ours:
                step_if(norm.isfinite(), optimizer)
            elif factor == 1:
                optimizer.step()
            optimizer.zero_grad()
    expected = reference.state_dict()
    assert all(torch.equal(v, expected[name]) for name, v in network.state_dict().items())
    for found, wanted in zip(ours.state.values(), stock.state.values(), strict=True):
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("weight", [0.9, 0.5, 0.1, 1e-4])
def test_the_average_of_a_gpu_is_the_stock_one_and_stays_in_a_skipped_step(weight):
    network = tiny_dit()
    stock, average = Average(network), Average(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) ** 3)
    for good in (torch.tensor(False), torch.tensor(True)):
        stock.update(weight, good)
        lerp_if(good, list(average.values.values()), list(network.parameters()), weight)
        for name, values in stock.values.items():
            assert torch.equal(average.values[name], values)


def test_clipping_scales_all_gradients_alike():
    network = tiny_dit()
    experts = remix(network, 3, 5)
    perturb(experts)
    found = []
    for limit in (0.0, 1e-3):
        with experts.route([0, 1, 2, 3, 4, 4]):
            torch.autograd.backward(network(*batch(network)).square().mean())
        norm = clip(weights_of(experts), experts.logits, limit)
        found.append([p.grad.clone() for p in network.parameters()])
        network.zero_grad()
    for whole, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled, whole * 1e-3 / norm, rtol=1e-3, atol=1e-12)


def test_the_prior_pulls_beside_the_task():
    experts = remix(tiny_dit(), 2, 4)
    experts.logits.grad = torch.full((4, 2), 0.5)
    task, prior = gradients_of_logits(experts, 0.1)
    expected = torch.autograd.grad(0.1 * experts.prior_loss().mean(), experts.logits)[0]
    assert task.item() == pytest.approx(0.5 * 8**0.5)
    assert prior.item() == pytest.approx(expected.norm().item())
    torch.testing.assert_close(experts.logits.grad, 0.5 + expected)


def test_the_prior_falls_to_exactly_zero():
    config = MixtureConfig(prior_strength=0.3)
    assert config.prior_at(0, 10) == 0.3
    assert config.prior_at(9, 10) == 0.0
    assert config.prior_at(0, 1) == 0.3
    constant = MixtureConfig(prior_strength=0.3, prior_schedule="constant")
    assert constant.prior_at(9, 10) == 0.3


def test_equal_bases_stay_equal_unless_the_start_breaks_the_symmetry():
    """Invariant 9: equal bases with equal coefficients cannot be left by training."""
    for symmetry, apart in ((0.0, False), (2.0, True)):
        network = tiny_dit()
        experts = remix(network, 2, 4, symmetry=symmetry)
        optimizer = optimizer_of(experts, OptimizerConfig(learning_rate=1e-2))
        for step in range(4):
            with experts.route([0, 1, 2, 3, 3, 3]):
                output = network(*batch(network, seed=step))
            weights = torch.arange(1.0, 7)[:, None, None, None]
            torch.autograd.backward((output.square() * weights).mean())
            if step == 0:
                assert experts.logits.grad.abs().max() < 1e-6
            optimizer.step()
            optimizer.zero_grad()
        first, second = (
            torch.cat([b[k].flatten() for b in experts.bases().values()]) for k in (0, 1)
        )
        assert torch.allclose(first, second, atol=1e-7) != apart


def test_averages_follow_the_weights_and_are_swapped_without_a_trace():
    network = tiny_dit()
    remix(network, 2, 4)
    average = Average(network)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    average.update(0.25, torch.tensor(True))
    with average.swapped_in():
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(parameter.detach(), before[name] + 0.25)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter.detach(), before[name] + 1.0)
