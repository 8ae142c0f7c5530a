"""The fused update against torch.optim.AdamW, and against the published training."""

import pytest
import torch
from torch import nn

from remixdit.diffusion.noise import Diffusion
from remixdit.first import kernels
from remixdit.first.mixing import Mixture
from remixdit.first.optim import MixtureAdamW, OptimizerConfig
from tests.tiny import batch, published_mixture, tiny_dit


def toy_loss(network: nn.Module, seed: int) -> torch.Tensor:
    latents, timesteps, class_labels = batch(network, seed=seed)
    return network(latents, timesteps, class_labels).square().mean()


def test_training_equals_the_published_training(given, settings):
    """20 steps of the reference: losses, logits and outputs, and the same of the averages."""
    train = settings["train"]
    mixture = published_mixture(given, settings)
    config = OptimizerConfig(
        learning_rate=train["lr"],
        coefficients_learning_rate=train["coefficients_lr"],
        betas=tuple(train["betas"]),
        eps=train["eps"],
        weight_decay=train["weight_decay"],
        max_grad_norm=0,
        ema_decay=train["ema_decay"],
        ema_warmup=False,
    )
    optimizer = MixtureAdamW(mixture, config)
    diffusion, losses = Diffusion(), []
    for step in range(train["steps"]):
        latents, noise = given["train.x_start"][step], given["train.noise"][step]
        timesteps = given["train.timesteps"][step]
        noisy = diffusion.add_noise(latents, noise, timesteps)
        optimizer.gradients.begin_step()
        optimizer.gradients.begin_expert(int(given["train.experts"][step]))
        output = mixture.network(noisy, timesteps, given["train.class_labels"][step])
        loss = diffusion.loss(output, latents, noise, timesteps).total.mean()
        torch.autograd.backward(loss)
        optimizer.gradients.collect()
        optimizer.step(step, train["steps"], train["prior_strength"])
        losses.append(loss.detach())

    def check(kind: str) -> None:
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(
            mixture.logits.detach(), given[f"train.{kind}logits_after"], **close
        )
        expected = given[f"train.{kind}output_after"]
        # 20 steps of Adam amplify rounding: in float64 the same training ends 1.6e-5 from here.
        close = {"rtol": 1e-4, "atol": 5e-5}
        for expert in range(settings["num_experts"]):
            mixture.activate(expert)
            with torch.no_grad():
                output = mixture.network(
                    given["remix.latents"],
                    given["remix.timesteps"][expert],
                    given["remix.class_labels"],
                )
            torch.testing.assert_close(output, expected[expert], **close)

    torch.testing.assert_close(torch.stack(losses), given["train.losses"], rtol=1e-4, atol=1e-5)
    check("")
    with optimizer.averaged():
        check("ema_")
    check("")  # and back again


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
@pytest.mark.parametrize("mixed", ["attention+mlp", "all"])
def test_one_basis_is_plain_training_bit_for_bit(mixed, max_grad_norm):
    plain, remixed = tiny_dit(), tiny_dit()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    mixture = Mixture(remixed, 1, 1, mixed=mixed)
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=max_grad_norm)
    optimizer = MixtureAdamW(mixture, config)
    for step in range(5):
        reference.zero_grad()
        torch.autograd.backward(toy_loss(plain, step))
        optimizer.gradients.begin_step()
        optimizer.gradients.begin_expert(0)
        torch.autograd.backward(toy_loss(remixed, step))
        optimizer.gradients.collect()
        if max_grad_norm:
            # torch's clipping sums norms of parameters, ours all squares: equal but for rounding,
            # so the same number is given to both.
            scale = optimizer._clip_scale(optimizer._grad_norm())
            for parameter in plain.parameters():
                parameter.grad.mul_(scale)
        reference.step()
        optimizer.step(step, 5)
    for (name, ours), theirs in zip(remixed.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def explicit_weights(mixture, leaves, expert):
    """Return the weights of an expert as autograd sees them."""
    coefficients = leaves["logits"][..., expert, :]
    if mixture.kind == "softmax":
        coefficients = coefficients.softmax(-1)
    weights = {}
    for name, _ in mixture.network.named_parameters():
        row = coefficients
        if mixture.per_block:
            row = coefficients[int(name.split(".")[1]) if name.startswith("blocks.") else -1]
        if f"bases.{name}" in leaves:
            weights[name] = torch.tensordot(row, leaves[f"bases.{name}"], 1)
        else:
            weights[name] = leaves[f"shared.{name}"]
    return weights


def explicit_gradients(mixture, leaves, experts, losses_of):
    """Set the gradients of all leaves by autograd through an explicit mixture."""
    for leaf in leaves.values():
        leaf.grad = None
    total = torch.zeros(())
    for m, expert in enumerate(experts):
        weights = explicit_weights(mixture, leaves, expert)
        total = total + losses_of(
            m, lambda *i, w=weights: torch.func.functional_call(mixture.network, w, i)
        )
    torch.autograd.backward(total)


@pytest.mark.parametrize("kind", ["softmax", "raw"])
@pytest.mark.parametrize("per_block", [False, True])
@pytest.mark.parametrize("mixed", ["attention+mlp", "all"])
@pytest.mark.parametrize("experts", [(4,), (0, 3), (0, 1, 2, 3, 4)])
def test_the_fused_step_equals_adamw_on_explicit_gradients(kind, per_block, mixed, experts):
    network = tiny_dit().double()  # in float32, Adam makes steps of what is rounding
    mixture = Mixture(network, 3, 5, mixed=mixed, coefficients=kind, per_block=per_block)
    mixture.perturb(0.5, torch.Generator().manual_seed(1))
    config = OptimizerConfig(
        learning_rate=1e-2, coefficients_learning_rate=3e-2, max_grad_norm=0, ema_decay=0.5
    )
    optimizer = MixtureAdamW(mixture, config)

    def losses_of(m, call):
        latents, timesteps, class_labels = batch(network, seed=m)
        return call(latents.double(), timesteps, class_labels).square().mean()

    state = mixture.state_dict()
    leaves = {name: value.detach().clone().requires_grad_() for name, value in state.items()}
    averages = {name: value.detach().clone() for name, value in leaves.items()}
    weights = [leaf for name, leaf in leaves.items() if name != "logits"]
    groups = [{"params": [leaves["logits"]], "lr": 3e-2}, {"params": weights, "lr": 1e-2}]
    reference = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(3):
        explicit_gradients(mixture, leaves, experts, losses_of)
        reference.step()
        optimizer.gradients.begin_step(len(experts))
        for m, expert in enumerate(experts):
            optimizer.gradients.begin_expert(expert)
            torch.autograd.backward(losses_of(m, network))
            optimizer.gradients.collect()
        optimizer.step(step, 3)
        for name, value in averages.items():
            value.lerp_(leaves[name].detach(), config.ema_weight(step))
    close = {"rtol": 1e-7, "atol": 1e-8}
    for name, ours in mixture.state_dict().items():
        torch.testing.assert_close(ours, leaves[name].detach(), **close)
    with optimizer.averaged():
        for name, ours in mixture.state_dict().items():
            torch.testing.assert_close(ours, averages[name], **close)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_the_compiled_update_is_one_kernel_without_a_temporary_of_all_bases(rows):
    """Read off what Inductor made: equal numbers, one loop over memory, nothing allocated."""
    from torch._inductor.utils import run_and_get_code

    generator = torch.Generator().manual_seed(0)
    arrays = [torch.rand(4, 4096, generator=generator) for _ in range(4)]
    grads = torch.randn(rows, 4096, generator=generator)
    weights = torch.rand(rows, 4, generator=generator)
    numbers = kernels.AdamW(1e-3, 0.1, 0.999, 1e-3, 0.5, 1e-8, 0.99, 0.2)
    expected = [values.clone() for values in arrays]
    kernels.update(tuple(expected), grads, weights, numbers, compile=False)
    kernels.compiled.cache_clear()
    _, code = run_and_get_code(kernels.update, tuple(arrays), grads, weights, numbers, True)
    for ours, theirs in zip(arrays, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    if rows == 1:
        (source,) = code
        assert source.count("= async_compile.cpp_pybinding") == 1
        allocated = [
            line for line in source.splitlines() if "empty_strided" in line and "buf" in line
        ]
        assert allocated == []


@pytest.mark.parametrize("columns", [1, 1000, 2**19 + 3])
def test_chunks_of_an_update_do_not_change_it(columns):
    generator = torch.Generator().manual_seed(0)
    arrays = [torch.rand(2, columns, generator=generator) for _ in range(4)]
    whole = [values.clone() for values in arrays]
    grads, weights = torch.randn(1, columns, generator=generator), torch.rand(1, 2)
    numbers = kernels.AdamW(1e-3, 0.1, 0.999, 1e-3, 0.5, 1e-8, 0.99, 0.2)
    kernels.update(tuple(arrays), grads, weights, numbers, compile=False)
    bases, exp_avg, exp_avg_sq, ema = whole
    kernels.adamw_step(bases, grads, weights, exp_avg, exp_avg_sq, ema, numbers)
    for ours, theirs in zip(arrays, whole, strict=True):
        assert torch.equal(ours, theirs)


def test_reading_the_average_early_does_not_change_it():
    """It takes in new weights with the next step's pass, or when somebody looks."""
    results = []
    for look in (False, True):
        mixture = Mixture(tiny_dit(), 2, 3)
        optimizer = MixtureAdamW(mixture, OptimizerConfig(learning_rate=1e-2))
        for step in range(4):
            optimizer.gradients.begin_step()
            optimizer.gradients.begin_expert(step % 3)
            torch.autograd.backward(toy_loss(mixture.network, step))
            optimizer.gradients.collect()
            optimizer.step(step, 4)
            if look:
                assert len(optimizer.ema) == len(mixture.segments) + 1
        results.append([values.clone() for values in optimizer.ema])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
