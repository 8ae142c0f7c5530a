"""Whole models: experts, grouping by timestep, and the directory on disk."""

import copy
import json
import pickle
import threading

import pytest
import torch

from remixdit import DiT, RemixConfig, RemixDiT
from tests.tiny import batch, perturb, tiny_config, tiny_dit


def tiny_model(num_bases: int = 2, num_experts: int = 7, **options: object) -> RemixDiT:
    model = RemixDiT.from_dit(tiny_dit(), num_bases, num_experts, **options)
    perturb(model.experts, 0.5, 0)
    return model


@pytest.mark.parametrize("kind", ["softmax", "raw", "one_hot"])
def test_a_remixed_dit_starts_as_the_dit(kind):
    network = tiny_dit()
    model = RemixDiT.from_dit(network, 3, 8, coefficients=kind)
    inputs = batch(network)
    torch.testing.assert_close(
        model.denoise(*inputs), network(*inputs).detach(), rtol=1e-5, atol=1e-6
    )


def test_a_batch_that_spans_intervals_is_grouped_never_averaged():
    model = tiny_model()
    latents, _, class_labels = batch(model.network, 50)
    timesteps = torch.linspace(0, 999, 50).long()
    output = model.denoise(latents, timesteps, class_labels)
    owners = model.intervals.expert_at(timesteps)
    assert len(owners.unique()) == 7
    for row in range(50):
        network = model.expert(int(owners[row]))
        rows = slice(row, row + 1)
        with torch.no_grad():
            expected = network(latents[rows], timesteps[rows], class_labels[rows])
        torch.testing.assert_close(output[rows], expected, rtol=1e-4, atol=1e-5)


def test_an_expert_is_a_plain_network_of_its_own():
    model = tiny_model()
    network = model.expert(3)
    assert type(network) is DiT
    before = [p.clone() for p in network.parameters()]
    model.predict(6, *batch(network))
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    model = tiny_model(class_names=("ä", "b", "c"), per_block=True)
    model.save_pretrained(tmp_path / "model")
    again = RemixDiT.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    inputs = batch(model.network)
    assert torch.equal(again.denoise(*inputs), model.denoise(*inputs))
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("intervals", [None, (0, 1, 500, 1000)])
def test_boundaries_are_written_out(tmp_path, intervals):
    config = RemixConfig(network=tiny_config(), num_bases=1, num_experts=3, boundaries=intervals)
    RemixDiT(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["boundaries"] == list(intervals or (0, 333, 666, 1000))
    assert RemixDiT.from_pretrained(tmp_path).intervals.boundaries == tuple(written["boundaries"])


def test_a_flow_model_splits_continuous_time(tmp_path):
    config = RemixConfig(
        network=tiny_config(learn_sigma=False),
        num_bases=2,
        num_experts=4,
        prediction_type="flow_prediction",
    )
    model = RemixDiT(config)
    model.save_pretrained(tmp_path)
    again = RemixDiT.from_pretrained(tmp_path)
    assert again.intervals.is_continuous
    latents, _, class_labels = batch(model.network)
    assert again.denoise(latents, torch.linspace(0, 1, 6), class_labels).shape == latents.shape


def test_moving_a_model_keeps_network_and_bases_together():
    model = tiny_model().to("cpu").double()
    inputs = batch(model.network)
    expected = model.denoise(inputs[0].double(), *inputs[1:])
    assert expected.dtype == torch.float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert model.denoise(inputs[0].double(), *inputs[1:]).abs().max() == 0


def test_a_copy_and_a_loaded_state_are_the_same_model():
    model, other = tiny_model(), RemixDiT.from_dit(tiny_dit(seed=1), 2, 7)
    inputs = batch(model.network)
    expected = model.denoise(*inputs)
    copied = copy.deepcopy(model)
    assert torch.equal(copied.denoise(*inputs), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.denoise(*inputs), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(model.denoise(*inputs), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_labels": torch.tensor([4])}, r"class_labels must be in \[0, 3\], got 4"),
        ({"timesteps": torch.tensor([1000])}, r"timesteps must be in \[0, 1000\), got 1000"),
        ({"timesteps": torch.tensor([1, 2])}, r"timesteps must be \(1,\), got \(2,\)"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"latents must be \(B, \(1, 8, 8\)\)"),
        ({"latents": torch.zeros(0, 1, 8, 8), "timesteps": torch.zeros(0)}, "at least one image"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    inputs = {
        "latents": torch.zeros(1, 1, 8, 8),
        "timesteps": torch.tensor([5]),
        "class_labels": torch.tensor([0]),
    }
    if "latents" in change and len(change["latents"]) == 0:
        inputs["class_labels"] = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        tiny_model().denoise(**{**inputs, **change})


def test_directories_that_are_no_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model directory must hold a config\.json"):
        RemixDiT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format_version must be 1, got 99"):
        RemixDiT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"boundaries": (0, 500, 1000)}, "boundaries must be 8 numbers for num_experts 7, got 3"),
        ({"prediction_type": "sample"}, "prediction_type must be one of"),
        ({"class_names": ("a",)}, "class_names must be 3 names, got 1"),
        ({"prediction_type": "flow_prediction"}, "learn_sigma must be false"),
    ],
)
def test_configurations_that_do_not_fit_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RemixConfig(network=tiny_config(), num_bases=2, num_experts=7, **fields)


def test_experts_trained_apart_are_put_together():
    networks = [tiny_dit(seed) for seed in range(3)]
    model = RemixDiT.from_experts(networks, (0, 100, 500, 1000))
    latents, _, class_labels = batch(networks[0])
    timesteps = torch.tensor([0, 99, 100, 499, 500, 999])
    output = model.denoise(latents, timesteps, class_labels)
    for row, owner in enumerate([0, 0, 1, 1, 2, 2]):
        rows = slice(row, row + 1)
        with torch.no_grad():
            expected = networks[owner](latents[rows], timesteps[rows], class_labels[rows])
        torch.testing.assert_close(output[rows], expected, rtol=1e-4, atol=1e-5)
    assert not model.experts.logits.requires_grad
    with pytest.raises(ValueError, match=r"depth of networks\[1\] must be 2, as for .*, got 1"):
        RemixDiT.from_experts([tiny_dit(), tiny_dit(depth=1)])
    with pytest.raises(ValueError, match="networks must hold at least one expert"):
        RemixDiT.from_experts([])


def test_forward_is_what_denoise_computes_and_has_gradients():
    model = tiny_model()
    latents, timesteps, class_labels = batch(model.network, 9)
    output = model(latents, timesteps, class_labels)
    expected = model.denoise(latents, timesteps, class_labels)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.autograd.backward(output.square().mean())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_any_optimizer_trains_a_model_and_denoise_follows():
    model = tiny_model()
    inputs = batch(model.network)
    before = model.denoise(*inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.autograd.backward(model(*inputs).square().mean())
    optimizer.step()
    after = model.denoise(*inputs)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model(*inputs).detach(), rtol=1e-4, atol=1e-5)


def test_a_pickled_model_has_the_weights_of_now():
    model = tiny_model()
    inputs = batch(model.network)
    model.denoise(*inputs)  # the plain network of sampling is not pickled
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.denoise(*inputs), model.denoise(*inputs))


def test_threads_may_share_a_model():
    model = tiny_model()
    latents, _, class_labels = batch(model.network)
    expected = [
        model.denoise(latents, torch.full((6,), timestep), class_labels)
        for timestep in range(0, 1000, 50)
    ]
    wrong = []

    def work(start: int) -> None:
        for i in range(40):
            place = (start + i) % len(expected)
            found = model.denoise(latents, torch.full((6,), 50 * place), class_labels)
            if not torch.equal(found, expected[place]):
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(7 * n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
