"""Mixtures against explicit sums, of any network, and what cannot be mixed."""

import pytest
import torch
from torch import nn

from remixdit.first.mixing import Mixture
from remixdit.first.optim import MixtureAdamW, OptimizerConfig
from remixdit.first.step_gradients import StepGradients
from remixdit.mixture.coefficients import initial_table, prior_bases
from tests.tiny import batch, published_mixture, tiny_dit


def random_mixture(num_bases: int = 3, num_experts: int = 5, **options: object) -> Mixture:
    mixture = Mixture(tiny_dit(), num_bases, num_experts, **options)
    mixture.perturb(0.5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        if mixture.kind != "one_hot":
            mixture.logits.add_(torch.randn(mixture.logits.shape, generator=generator))
    return mixture


def test_outputs_equal_the_published_experts(given, settings):
    mixture = published_mixture(given, settings)
    for expert in range(settings["num_experts"]):
        mixture.activate(expert)
        with torch.no_grad():
            output = mixture.network(
                given["remix.latents"],
                given["remix.timesteps"][expert],
                given["remix.class_labels"],
            )
        torch.testing.assert_close(output, given["remix.output"][expert], rtol=1e-4, atol=1e-5)


def test_the_prior_equals_the_published_one(given, settings):
    mixture = published_mixture(given, settings)
    torch.testing.assert_close(mixture.prior_loss().detach(), given["remix.prior_loss"])
    assert prior_bases(2, 4).tolist() == settings["remix.prior"]


@pytest.mark.parametrize(("num_bases", "num_experts"), [(1, 7), (3, 7), (7, 7), (4, 1000)])
def test_every_basis_is_some_experts_own_for_any_numbers(num_bases, num_experts):
    own = prior_bases(num_bases, num_experts)
    assert own.unique().tolist() == list(range(num_bases))
    assert bool((own.diff() >= 0).all())


@pytest.mark.parametrize(("num_bases", "num_experts"), [(1, 1), (2, 4), (3, 7), (7, 7), (4, 1000)])
def test_every_expert_starts_closest_to_its_own_basis(num_bases, num_experts):
    table = initial_table(num_bases, num_experts, "softmax", 2.0).softmax(-1)
    assert torch.equal(table.argmax(1), prior_bases(num_bases, num_experts))
    raw = initial_table(num_bases, num_experts, "raw", 2.0)
    torch.testing.assert_close(raw, table)


@pytest.mark.parametrize("mixed", ["attention+mlp", "all", "blocks.*.mlp.*,final_layer.*"])
@pytest.mark.parametrize("per_block", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "raw", "one_hot"])
def test_an_active_expert_holds_the_weighted_sum_of_the_bases(mixed, per_block, kind):
    mixture = random_mixture(mixed=mixed, per_block=per_block, coefficients=kind)
    bases = {name: values.clone() for name, values in mixture.bases().items()}
    tables = mixture.coefficients().detach()
    assert tables.shape == (3 if per_block else 1, 5, 3)
    for expert in (2, 0, 4):
        mixture.activate(expert)
        for name, parameter in mixture.network.named_parameters():
            if name not in bases:
                continue
            block = int(name.split(".")[1]) if name.startswith("blocks.") else -1
            table = tables[block if per_block else 0, expert]
            expected = torch.tensordot(table, bases[name], 1)
            torch.testing.assert_close(parameter.detach(), expected)


def test_the_storage_of_the_parameters_never_moves():
    mixture = random_mixture()
    optimizer = MixtureAdamW(mixture, OptimizerConfig())
    addresses = [parameter.data_ptr() for parameter in mixture.network.parameters()]
    for step, expert in enumerate((0, 3, 1)):
        optimizer.gradients.begin_step()
        optimizer.gradients.begin_expert(expert)
        torch.autograd.backward(mixture.network(*batch(mixture.network)).sum())
        optimizer.gradients.collect()
        optimizer.step(step, 3)
        with optimizer.averaged():
            mixture.activate(2)
            assert addresses == [p.data_ptr() for p in mixture.network.parameters()]
        mixture.load_state_dict({k: v.clone() for k, v in mixture.state_dict().items()})
    mixture.cast_network(torch.float32)
    mixture.activate(1)
    after = [parameter.data_ptr() for parameter in mixture.network.parameters()]
    mixed = {id(p) for s in mixture.segments if not s.constant for p in s.parameters}
    for parameter, old, new in zip(mixture.network.parameters(), addresses, after, strict=True):
        assert id(parameter) in mixed or old == new  # a cast makes room anew for what is mixed


def test_averages_are_swapped_in_and_out_without_a_trace():
    mixture = random_mixture()
    optimizer = MixtureAdamW(mixture, OptimizerConfig(learning_rate=0.1))
    optimizer.gradients.begin_step()
    optimizer.gradients.begin_expert(0)
    torch.autograd.backward(mixture.network(*batch(mixture.network)).sum())
    optimizer.gradients.collect()
    optimizer.step(0, 1)
    before = {name: values.clone() for name, values in mixture.state_dict().items()}
    with optimizer.averaged():
        inside = {name: values.clone() for name, values in mixture.state_dict().items()}
    for name, values in mixture.state_dict().items():
        assert torch.equal(values, before[name]), name
    assert any(not torch.equal(inside[name], before[name]) for name in before)


def test_activating_the_active_expert_again_does_nothing_until_weights_change():
    mixture = random_mixture()
    calls = []
    segment = next(s for s in mixture.segments if s.is_mixed)
    original = segment.mix
    segment.mix = lambda coefficients: (calls.append(1), original(coefficients))
    mixture.activate(1)
    mixture.activate(1)
    assert len(calls) == 1
    with torch.no_grad():
        mixture.logits += 1
    mixture.activate(1)
    segment.bases.mul_(2)
    mixture.activate(1)
    assert len(calls) == 3


def test_equal_bases_give_the_coefficients_no_task_gradient_and_the_start_breaks_the_symmetry():
    """Invariant 9: equal bases with equal coefficients stay equal; ours do not start so."""
    for symmetry, apart in ((0.0, False), (2.0, True)):
        network = tiny_dit()
        mixture = Mixture(network, 2, 4, symmetry=symmetry)
        optimizer = MixtureAdamW(mixture, OptimizerConfig(learning_rate=1e-2, max_grad_norm=0))
        for step in range(4):
            optimizer.gradients.begin_step(2)
            for expert in (step % 2, 2 + step % 2):
                optimizer.gradients.begin_expert(expert)
                inputs = batch(network, seed=expert)
                torch.autograd.backward(network(*inputs).square().mean() * (1 + expert))
                optimizer.gradients.collect()
            if step == 0:
                grads = optimizer._logits_grads(torch.ones(()), 0.0)[0]
                assert grads.abs().max() < 1e-6
            optimizer.step(step, 4)
        first, second = (
            torch.cat([b[k].flatten() for b in mixture.bases().values()]) for k in (0, 1)
        )
        assert torch.allclose(first, second, atol=1e-7) != apart


def test_one_hot_experts_do_not_move_unless_they_are_drawn():
    mixture = random_mixture(3, 3, coefficients="one_hot")
    optimizer = MixtureAdamW(mixture, OptimizerConfig(learning_rate=1e-2))
    for step, expert in enumerate((0, 1, 1)):
        before = {name: values.clone() for name, values in mixture.bases().items()}
        optimizer.gradients.begin_step()
        optimizer.gradients.begin_expert(expert)
        torch.autograd.backward(mixture.network(*batch(mixture.network)).square().sum())
        optimizer.gradients.collect()
        optimizer.step(step, 3)
        for name, values in mixture.bases().items():
            moved = [not torch.equal(values[k], before[name][k]) for k in range(3)]
            assert moved == [k == expert for k in range(3)], name
    assert optimizer.basis_steps == [1, 2, 0]


def test_an_independent_expert_trains_as_if_it_were_alone():
    """K = N one-hot, drawn in turn, against a plain DiT trained on its own steps alone."""
    mixture = Mixture(tiny_dit(), 2, 2, coefficients="one_hot", mixed="all")
    alone = Mixture(tiny_dit(), 1, 1, mixed="all")
    config = OptimizerConfig(learning_rate=1e-2)
    together, single = MixtureAdamW(mixture, config), MixtureAdamW(alone, config)
    for step in range(6):
        runs = [(mixture, together, step % 2, step)]
        if step % 2 == 1:
            runs.append((alone, single, 0, step // 2))
        for target, optimizer, expert, count in runs:
            optimizer.gradients.begin_step()
            optimizer.gradients.begin_expert(expert)
            inputs = batch(target.network, seed=step)
            torch.autograd.backward(target.network(*inputs).square().mean())
            optimizer.gradients.collect()
            optimizer.step(count, 6)
    mixture.activate(1)
    for ours, expected in zip(
        mixture.network.parameters(), alone.network.parameters(), strict=True
    ):
        assert torch.equal(ours, expected)


def test_rounds_of_accumulation_equal_one_batch():
    whole, parts = random_mixture(), random_mixture()
    for mixture, rounds in ((whole, 1), (parts, 3)):
        # Adam would make a rounding error of a tiny gradient as large as the gradient.
        optimizer = MixtureAdamW(mixture, OptimizerConfig(learning_rate=1e-2, eps=1e-3))
        latents, timesteps, class_labels = batch(mixture.network, 6)
        optimizer.gradients.begin_step(2, rounds)
        for expert in (1, 3):
            optimizer.gradients.begin_expert(expert)
            for rows in torch.arange(6).split(6 // rounds):
                output = mixture.network(latents[rows], timesteps[rows], class_labels[rows])
                torch.autograd.backward(output.square().sum() / 6)
                optimizer.gradients.collect()
        optimizer.step(0, 1)
    for name, values in parts.state_dict().items():
        torch.testing.assert_close(values, whole.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_the_number_of_experts_may_change_from_step_to_step():
    """K plain gradients, then K accumulated ones: the same shapes, filled in other ways."""
    found = []
    for before in ((), (0, 1, 2)):
        mixture = random_mixture()
        gradients = StepGradients(mixture)
        for experts in filter(None, (before, (0, 1, 2, 3, 4))):
            gradients.begin_step(len(experts))
            for expert in experts:
                gradients.begin_expert(expert)
                torch.autograd.backward(mixture.network(*batch(mixture.network)).square().mean())
                gradients.collect()
        found.append(next(s for s in mixture.segments if s.is_mixed).grads.clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("experts", [(2,), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_bfloat16_network_has_float32_bases_and_nearly_the_same_gradients(experts, rounds):
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        mixture = random_mixture()
        mixture.cast_network(dtype)
        gradients = StepGradients(mixture)
        gradients.begin_step(len(experts), rounds)
        for expert in experts:
            gradients.begin_expert(expert)
            for part in range(rounds):
                output = mixture.network(*batch(mixture.network, seed=part))
                torch.autograd.backward(output.square().mean())
                gradients.collect()
        assert all(segment.bases.dtype == torch.float32 for segment in mixture.segments)
        assert mixture.network.blocks[0].mlp.fc1.weight.dtype == dtype
        assert mixture.network.final_layer.linear.weight.dtype == torch.float32
        segment = next(s for s in mixture.segments if s.is_mixed)
        weights = gradients.basis_weights(segment)
        grads.append(weights.t() @ segment.grads.float())
        dots = torch.stack([values for _, values in gradients.coefficient_grads()])
        grads.append(dots)
    assert (grads[2] - grads[0]).norm() < 5e-2 * grads[0].norm()
    assert (grads[3] - grads[1]).norm() < 5e-2 * grads[1].norm()


class Tied(nn.Module):
    """A network with tied, frozen, unused and zero-dimensional parameters, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(4))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(self.first(inputs).tanh()) * self.scale + self.frozen)


def test_any_module_can_be_remixed():
    network = Tied()
    frozen, unused = network.frozen.clone(), network.unused.detach().clone()
    mixture = Mixture(network, 2, 4, mixed="all")
    mixture.perturb(0.5, torch.Generator().manual_seed(0))
    optimizer = MixtureAdamW(mixture, OptimizerConfig(learning_rate=0.1))
    optimizer.gradients.begin_step()
    optimizer.gradients.begin_expert(3)
    torch.autograd.backward(network(torch.randn(8, 4)).square().sum())
    optimizer.gradients.collect()
    kept = mixture.bases()["unused"].clone()
    optimizer.step(0, 1)
    assert network.second.weight is network.first.weight
    assert "second.weight" not in mixture.bases()
    assert torch.equal(network.frozen, frozen)
    assert torch.equal(mixture.bases()["unused"], kept)  # no gradient, no decay: no step
    assert not torch.equal(unused, kept[0])  # it was perturbed like the others
    assert mixture.bases()["scale"].shape == (2,)
    state = mixture.state_dict()
    assert {"shared.frozen", "shared.norm.running_mean"} <= state.keys()
    again = Mixture(Tied(), 2, 4, mixed="all")
    again.load_state_dict(state)
    mixture.activate(1)
    again.activate(1)
    network.eval()
    inputs = torch.randn(3, 4)
    assert torch.equal(again.network.eval()(inputs), network(inputs))
    plain = Tied()
    plain.load_state_dict(mixture.expert_state(1))
    assert torch.equal(plain.eval()(inputs), network(inputs))


def test_diffusers_transformers_can_be_remixed():
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=2,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    ).eval()
    inputs = (torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 2]))
    expected = network(*inputs).sample
    mixture = Mixture(network, 3, 6)
    assert all("attn" in name or ".ff." in name for name in mixture.bases())
    mixture.activate(5)
    torch.testing.assert_close(network(*inputs).sample, expected)


@pytest.mark.parametrize(
    ("numbers", "options", "message"),
    [
        ((0, 4), {}, "num_bases must be at least 1, got 0"),
        ((2, 0), {}, "num_experts must be at least 1, got 0"),
        ((5, 4), {}, "num_bases must be at most num_experts 4, got 5: .* only memory"),
        ((2, 4), {"mixed": "layers.*"}, "mixed must match a trainable parameter"),
        ((2, 4), {"coefficients": "sigmoid"}, "coefficients must be one of softmax, raw, one_hot"),
    ],
)
def test_what_cannot_be_mixed_is_refused(numbers, options, message):
    with pytest.raises(ValueError, match=message):
        Mixture(tiny_dit(), *numbers, **options)


def test_a_pattern_that_splits_tied_parameters_is_refused():
    with pytest.raises(ValueError, match="all names of a tied parameter"):
        Mixture(Tied(), 2, 4, mixed="first.*")


def test_an_expert_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"expert must be in \[0, 5\), got 5"):
        random_mixture().activate(5)


def test_weights_of_another_shape_are_refused():
    mixture = random_mixture()
    state = dict(mixture.state_dict())
    missing = dict(state)
    del missing["logits"]
    with pytest.raises(ValueError, match=r"missing \['logits'\]"):
        mixture.load_state_dict(missing)
    state["logits"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"logits must have the shape \(5, 3\), got \(2, 2\)"):
        mixture.load_state_dict(state)


def test_a_gradient_that_is_not_finite_counts_as_zero():
    for experts in ((1,), (0, 1, 2, 3, 4)):
        mixture = random_mixture()
        optimizer = MixtureAdamW(mixture, OptimizerConfig())
        before = {name: values.clone() for name, values in mixture.state_dict().items()}
        optimizer.gradients.begin_step(len(experts))
        for expert in experts:
            optimizer.gradients.begin_expert(expert)
            output = mixture.network(*batch(mixture.network))
            torch.autograd.backward(output.sum() * float("nan"))
            optimizer.gradients.collect()
        stats = optimizer.step(0, 1)
        assert not stats.grad_norm.isfinite()
        for name, values in mixture.state_dict().items():
            assert torch.equal(values, before[name]), name


def test_the_prior_falls_to_exactly_zero():
    from remixdit.training.config import MixtureConfig

    config = MixtureConfig(prior_strength=0.3)
    assert config.prior_at(0, 10) == 0.3
    assert config.prior_at(9, 10) == 0.0
    assert config.prior_at(0, 1) == 0.3
    constant = MixtureConfig(prior_strength=0.3, prior_schedule="constant")
    assert constant.prior_at(9, 10) == 0.3


def test_all_experts_run_one_compiled_graph():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    mixture = random_mixture()
    expected = []
    for expert in range(5):
        mixture.activate(expert)
        expected.append(mixture.network(*batch(mixture.network)).detach())
    graphs = CompileCounterWithBackend("aot_eager")
    mixture.network.compile(backend=graphs)
    optimizer = MixtureAdamW(
        mixture, OptimizerConfig(learning_rate=0.0, coefficients_learning_rate=0.0)
    )
    for expert in range(5):
        optimizer.gradients.begin_step()
        optimizer.gradients.begin_expert(expert)
        output = mixture.network(*batch(mixture.network))
        torch.testing.assert_close(output.detach(), expected[expert])
        torch.autograd.backward(output.sum())
        optimizer.gradients.collect()
        optimizer.step(expert, 5)
    assert graphs.frame_count == 1


def test_precomputed_experts_are_shown_and_a_later_mix_is_written_in_place():
    mixture = random_mixture()
    places = {name: p.data_ptr() for name, p in mixture.network.named_parameters()}
    expected = [mixture.expert_state(expert) for expert in range(mixture.num_experts)]
    mixture.precompute()
    for expert in (3, 0, 3):
        mixture.activate(expert)
        for name, values in mixture.network.state_dict().items():
            torch.testing.assert_close(values, expected[expert][name])
    mixture.perturb(0.1, torch.Generator().manual_seed(1))
    mixture.activate(3)
    assert {name: p.data_ptr() for name, p in mixture.network.named_parameters()} == places
    changed = mixture.expert_state(3)
    for name, values in mixture.network.state_dict().items():
        torch.testing.assert_close(values, changed[name])
