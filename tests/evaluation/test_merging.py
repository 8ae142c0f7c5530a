"""Experts merged into one plain network."""

import json

import numpy as np
import pytest
import torch

from remixdit.evaluation.held_out import HeldOut
from remixdit.evaluation.merging import MergeConfig, Trial, halves, measured_losses, search
from remixdit.model.merging import merged, shares
from remixdit.model.model import RemixDiT
from remixdit.progress import finish
from tests.command_line import json_result, refusal, remixdit, save_model
from tests.tiny import batch, perturb, tiny_dit

KINDS = [
    {},
    {"coefficients": "raw", "per_block": True, "mixed": "all"},
    {"rank": 2},
    {"prediction_type": "flow_prediction", "boundaries": (0.0, 0.1, 0.4, 1.0)},
]


def mixture(boundaries=(0, 100, 400, 1000), **options) -> RemixDiT:
    shape = {"learn_sigma": options.get("prediction_type") != "flow_prediction"}
    model = RemixDiT.from_dit(tiny_dit(**shape), 2, 3, boundaries=boundaries, **options)
    perturb(model.experts)
    if "rank" in options:  # up begins at zero
        with torch.no_grad():
            for name, values in model.experts.bases().items():
                values.add_(0.1 * torch.randn(values.shape, generator=seeded(len(name))))
    return model.eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 8) -> HeldOut:
    latents = torch.randn((count, 1, 8, 8), generator=seeded(1))
    return HeldOut(latents, torch.arange(count) % 3)


@pytest.mark.parametrize("options", KINDS)
def test_the_mean_is_that_of_the_experts_by_their_share_of_the_timesteps(options):
    model = mixture(**options)
    assert shares(model).tolist() == pytest.approx([0.1, 0.3, 0.6])
    plain = merged(model, shares(model))
    assert (plain.num_bases, plain.num_experts, plain.config.rank) == (1, 1, 0)
    experts = [model.expert(number).state_dict() for number in range(3)]
    for name, values in plain.expert(0).state_dict().items():
        expected = sum(w * e[name] for w, e in zip((0.1, 0.3, 0.6), experts, strict=True))
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", KINDS)
def test_the_gradient_that_is_followed_is_that_of_the_measured_loss(options):
    model, config = mixture(**options), MergeConfig()
    trial, weights = Trial(model, images(), config), shares(model)
    slope, step = trial.slope(weights), 1e-2
    ups = weights + step * (torch.eye(3, dtype=torch.float64) - weights)
    downs = weights - step * (torch.eye(3, dtype=torch.float64) - weights)
    found = torch.tensor(
        [trial.loss(up) - trial.loss(down) for up, down in zip(ups, downs, strict=True)]
    )
    torch.testing.assert_close(
        slope, found / found.abs().max(), rtol=0.05, atol=0.02, check_dtype=False
    )


@pytest.mark.parametrize("options", KINDS)
def test_the_search_is_never_worse_than_the_mean_on_the_images_it_searched(options):
    model, config = mixture(**options), MergeConfig(num_candidates=6)
    before = {name: values.clone() for name, values in model.weights().items()}
    found = finish(search(model, images(), config))
    best = min(found, key=lambda candidate: candidate.loss)
    assert best.loss < found[0].loss
    assert torch.equal(found[0].weights, shares(model))
    for weights, loss in (found[0], best):
        assert weights.min() >= 0
        assert float(weights.sum()) == pytest.approx(1)
        measured = measured_losses(model, images(), weights, config)["value"]
        assert measured == pytest.approx(loss, rel=1e-5)
    assert len(found) <= 6
    assert all(torch.equal(values, before[name]) for name, values in model.weights().items())


def test_equal_experts_leave_nothing_to_search():
    model = RemixDiT.from_dit(tiny_dit(), 2, 3)
    found = finish(search(model, images(), MergeConfig(num_candidates=3)))
    losses = [candidate.loss for candidate in found]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    inputs = batch(model.network)
    output = merged(model, found[-1].weights).denoise(*inputs)
    torch.testing.assert_close(output, model.denoise(*inputs), rtol=1e-4, atol=1e-5)


def test_the_images_that_are_searched_and_those_that_are_not_share_none():
    searched, others = halves(images(7))
    rows = torch.cat([searched.latents, others.latents]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 7
    with pytest.raises(ValueError, match="num_images must be at least 4 to search, got 3"):
        halves(images(3))


def test_the_command_writes_the_mean_without_data(tmp_path):
    save_model(tmp_path / "model", 0)
    remixdit(f"merge {tmp_path}/model --output {tmp_path}/out")
    model = RemixDiT.from_pretrained(tmp_path / "model")
    plain = RemixDiT.from_pretrained(tmp_path / "out")
    expected = merged(model, shares(model)).weights()
    assert all(torch.equal(values, expected[name]) for name, values in plain.weights().items())
    weights = json.loads((tmp_path / "out" / "merge.json").read_text())["weights"]
    assert weights == pytest.approx([0.2] * 5)


def test_the_command_measures_candidates_beside_the_mixture(data, tmp_path, capsys):
    save_model(tmp_path / "model", 0)
    line = f"merge {tmp_path}/model --data {data} --num-candidates 3"
    remixdit(f"{line} --output {tmp_path}/out")
    printed = capsys.readouterr().out
    assert printed.count("candidate ") == 3
    result = json_result(f"{line} --output {tmp_path}/again", capsys)
    values = [candidate["loss"] for candidate in result["candidates"]]
    assert result["losses"]["searched"]["searched"]["value"] == pytest.approx(min(values), rel=1e-5)
    for part in result["losses"].values():
        assert {name: one["num_images"] for name, one in part.items()} == {
            "mean": 12,
            "searched": 12,
        }
        assert part["mean"]["against"] == part["searched"]["against"]
    plain = RemixDiT.from_pretrained(tmp_path / "again")
    best = merged(RemixDiT.from_pretrained(tmp_path / "model"), torch.tensor(result["weights"]))
    for name, values in plain.weights().items():
        np.testing.assert_allclose(values, best.weights()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num-images 8", "num_images must be left out without data, got 8"),
        ("--num-candidates 0", "num_candidates must be at least 1, got 0"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message, tmp_path, capsys):
    save_model(tmp_path / "model", 0)
    assert refusal(f"merge {tmp_path}/model --output {tmp_path}/out {options}", capsys) == message
    assert not (tmp_path / "out").exists()


def test_a_plain_network_has_nothing_to_merge(tmp_path, capsys):
    save_model(tmp_path / "model", 0, num_experts=1)
    told = refusal(f"merge {tmp_path}/model --output {tmp_path}/out", capsys)
    assert told == "checkpoint must have experts to merge, got 1"
