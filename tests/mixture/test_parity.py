"""The mixture against the vectors of the published implementation."""

import pytest
import torch

from remixdit.diffusion.noise import Diffusion
from remixdit.mixture.coefficients import prior_bases
from remixdit.training.average import Average
from remixdit.training.optimizer import OptimizerConfig, clip, gradients_of_logits, optimizer_of
from tests.tiny import published_remix


def outputs(model, given, settings):
    """Return the output of every expert at its own timesteps."""
    found = []
    for expert in range(settings["num_experts"]):
        count = len(given["remix.latents"])
        with torch.no_grad(), model.experts.route([expert] * count):
            inputs = (given["remix.latents"], given["remix.timesteps"][expert])
            found.append(model.network(*inputs, given["remix.class_labels"]))
    return found


def test_outputs_equal_the_published_experts(given, settings):
    model = published_remix(given, settings)
    for found, expected in zip(outputs(model, given, settings), given["remix.output"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for expert in range(settings["num_experts"]):
        inputs = (given["remix.latents"], given["remix.timesteps"][expert])
        found = model.expert(expert)(*inputs, given["remix.class_labels"])
        torch.testing.assert_close(found, given["remix.output"][expert], rtol=1e-4, atol=1e-5)


def test_the_prior_equals_the_published_one(given, settings):
    experts = published_remix(given, settings).experts
    torch.testing.assert_close(experts.prior_loss().detach(), given["remix.prior_loss"])
    assert prior_bases(2, 4).tolist() == settings["remix.prior"]


@pytest.mark.parametrize(("num_bases", "num_experts"), [(1, 7), (3, 7), (7, 7), (4, 1000)])
def test_every_basis_is_some_experts_own_for_any_numbers(num_bases, num_experts):
    own = prior_bases(num_bases, num_experts)
    assert own.unique().tolist() == list(range(num_bases))
    assert bool((own.diff() >= 0).all())


def test_training_equals_the_published_training(given, settings):
    model, train = published_remix(given, settings), settings["train"]
    experts = model.experts
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
    optimizer, average = optimizer_of(experts, config), Average(model.network)
    diffusion, losses = Diffusion(), []
    weights = [p for p in model.network.parameters() if p is not experts.logits]
    for step in range(train["steps"]):
        latents, noise = given["train.x_start"][step], given["train.noise"][step]
        timesteps = given["train.timesteps"][step]
        noisy = diffusion.add_noise(latents, noise, timesteps)
        with experts.route([int(given["train.experts"][step])] * len(latents)):
            output = model.network(noisy, timesteps, given["train.class_labels"][step])
        loss = diffusion.loss(output, latents, noise, timesteps).total.mean()
        torch.autograd.backward(loss)
        clip(weights, experts.logits, config.max_grad_norm)
        gradients_of_logits(experts, train["prior_strength"])
        optimizer.step()
        optimizer.zero_grad()
        average.update(config.ema_weight(step), torch.tensor(True))
        losses.append(loss.detach())

    def check(kind: str) -> None:
        expected = given[f"train.{kind}logits_after"]
        torch.testing.assert_close(experts.logits.detach(), expected, rtol=1e-4, atol=1e-5)
        # 20 steps of Adam amplify rounding: in float64 the same training ends 1.6e-5 from here.
        pairs = zip(
            outputs(model, given, settings), given[f"train.{kind}output_after"], strict=True
        )
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=5e-5)

    torch.testing.assert_close(torch.stack(losses), given["train.losses"], rtol=1e-4, atol=1e-5)
    check("")
    with average.swapped_in():
        check("ema_")
    check("")  # and back again
