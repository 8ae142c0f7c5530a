"""Published checkpoints in, plain networks out; nothing that a file asks for is run."""

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from remixdit.diffusion.dit import DiT
from remixdit.files import new_directory
from remixdit.interchange import (
    ExportConfig,
    ImportConfig,
    export_diffusers,
    export_dit,
    export_experts,
    import_checkpoint,
    run_export,
    run_import,
)
from remixdit.interchange.layout import published_num_heads
from remixdit.model.model import RemixDiT
from tests.tiny import batch, perturb, tiny_dit

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
MIT = {"license": "mit"}
SHAPES = [
    {"patch_size": 4, "in_channels": 1},
    {"in_channels": 3, "learn_sigma": False},
    {"num_classes": 0},
    {"mlp_ratio": 2.5, "depth": 3, "in_channels": 4},
    {"hidden_size": 12, "mlp_ratio": 17 / 12, "input_size": 16},
]


def weights_of(given, kind: str) -> dict[str, torch.Tensor]:
    prefix = f"{kind}.weights."
    return {n.removeprefix(prefix): v for n, v in given.items() if n.startswith(prefix)}


def published(network: DiT) -> dict[str, torch.Tensor]:
    state = {name: values.clone() for name, values in network.state_dict().items()}
    return {**state, "pos_embed": network.pos_embed.clone()}


def published_remix(model: RemixDiT) -> dict[str, torch.Tensor]:
    state = published(model.network)
    del state["experts.logits"]  # which published code calls otherwise
    return {**state, "coefficients.weight": model.experts.logits.detach()}


def remixed(num_bases: int = 2, num_experts: int = 4, **shape) -> RemixDiT:
    model = RemixDiT.from_dit(tiny_dit(**shape), num_bases, num_experts)
    perturb(model.experts, 0.5, 0)
    return model


def saved(state, tmp_path: Path, **options) -> Path:
    torch.save(state, tmp_path / "given.pt", **options)
    return tmp_path / "given.pt"


def equal_states(mine: DiT, other: DiT) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(values, theirs[name]) for name, values in mine.state_dict().items())


def training_checkpoint(weights) -> dict:
    """As the published training code writes it."""
    last = {name: torch.zeros_like(values) for name, values in weights.items()}
    last["pos_embed"] = weights["pos_embed"]
    arguments = argparse.Namespace(model="DiT-S/2", num_classes=10, ckpt=None, lr=1e-4)
    moments = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}}
    opt = {**moments, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]}
    return {"model": last, "ema": weights, "opt": opt, "args": arguments}


# --- published checkpoints


@pytest.mark.parametrize("kind", ["plain", "training", "old", "prefixed", "safetensors"])
def test_an_imported_dit_equals_the_published_one(kind, given, settings, tmp_path):
    weights = weights_of(given, "dit")
    if kind == "plain":
        path = saved(weights, tmp_path)
    elif kind == "training":
        path = saved(training_checkpoint(weights), tmp_path)
    elif kind == "old":  # before torch 1.6: no zip archive
        content = training_checkpoint(weights)
        path = saved(content, tmp_path, _use_new_zipfile_serialization=False)
    elif kind == "prefixed":
        path = saved({f"_orig_mod.module.{n}": v for n, v in weights.items()}, tmp_path)
    else:
        path = tmp_path / "given.safetensors"
        save_file(weights, path)
    model = import_checkpoint(path, num_heads=settings["config"]["num_heads"], **MIT)
    for name, value in settings["config"].items():
        assert getattr(model.config.network, name) == value
    assert (model.num_bases, model.num_experts) == (1, 1)
    output = model.denoise(given["dit.latents"], given["dit.timesteps"], given["dit.class_labels"])
    torch.testing.assert_close(output, given["dit.output"], **CLOSE)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_imported_remix_dit_equals_the_published_one(wrapped, given, settings, tmp_path):
    weights = weights_of(given, "remix")
    path = saved(training_checkpoint(weights) if wrapped else weights, tmp_path)
    model = import_checkpoint(path, num_heads=settings["config"]["num_heads"], **MIT)
    assert (model.num_bases, model.num_experts) == (settings["num_bases"], settings["num_experts"])
    for expert, timesteps in enumerate(given["remix.timesteps"]):
        output = model.denoise(given["remix.latents"], timesteps, given["remix.class_labels"])
        torch.testing.assert_close(output, given["remix.output"][expert], **CLOSE)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_dit_is_inferred(shape, tmp_path):
    network = tiny_dit(**shape)
    model = import_checkpoint(saved(published(network), tmp_path), num_heads=2, **MIT)
    found, expected = model.config.network, network.config
    assert found.mlp_ratio == pytest.approx(expected.mlp_ratio)
    assert equal_states(model.expert(0), network)
    inputs = batch(network)
    with torch.no_grad():
        assert torch.equal(model.denoise(*inputs), network.eval()(*inputs))


@pytest.mark.parametrize("counts", [(3, 5), (1, 3), (4, 4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_remix_dit_is_inferred(shape, counts, tmp_path):
    model = remixed(*counts, **shape)
    path = saved(published_remix(model), tmp_path)
    found = import_checkpoint(path, num_heads=2, **MIT)
    assert (found.num_bases, found.num_experts) == counts
    assert found.config.network.learn_sigma == model.config.network.learn_sigma
    inputs = batch(model.network)
    assert torch.equal(found.denoise(*inputs), model.denoise(*inputs))


def test_a_basis_axis_means_a_sum_weighted_by_the_softmax(tmp_path):
    state = published_remix(remixed(3, 5))
    model = import_checkpoint(saved(state, tmp_path), num_heads=2, **MIT)
    weights = state.pop("coefficients.weight").softmax(1)[4]
    for name, values in state.items():
        if name.startswith("blocks.") and ".adaLN" not in name:
            state[name] = (weights.view(-1, *[1] * (values.ndim - 1)) * values).sum(0)
    plain = tiny_dit(seed=1)
    plain.load_state_dict({n: v for n, v in state.items() if n != "pos_embed"})
    latents, _, labels = batch(plain)
    timesteps = torch.full((len(latents),), 900)
    with torch.no_grad():
        expected = plain.eval()(latents, timesteps, labels)
    torch.testing.assert_close(model.denoise(latents, timesteps, labels), expected, **CLOSE)


def test_the_averaged_weights_are_taken_unless_told_otherwise(tmp_path):
    network = tiny_dit()
    path = saved(training_checkpoint(published(network)), tmp_path)
    assert equal_states(import_checkpoint(path, num_heads=2, **MIT).expert(0), network)
    last = import_checkpoint(path, num_heads=2, ema=False, **MIT).expert(0)
    assert all(not values.any() for values in last.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype, tmp_path):
    network = tiny_dit()
    state = {name: values.to(dtype) for name, values in published(network).items()}
    plain = import_checkpoint(saved(state, tmp_path), num_heads=2, **MIT).expert(0)
    for name, values in plain.state_dict().items():
        assert values.dtype == torch.float32
        assert torch.equal(values, state[name].float())


def test_a_plain_dit_is_remixed_on_request_and_starts_as_it_was(tmp_path):
    network = tiny_dit()
    path = saved(published(network), tmp_path)
    model = import_checkpoint(path, num_heads=2, num_bases=3, num_experts=7, **MIT)
    assert (model.num_bases, model.num_experts) == (3, 7)
    inputs = batch(network)
    with torch.no_grad():
        torch.testing.assert_close(model.denoise(*inputs), network.eval()(*inputs), **CLOSE)


def test_the_published_widths_have_their_heads():
    assert [published_num_heads(width) for width in (384, 768, 1024, 1152)] == [6, 12, 16, 16]


def test_the_input_size_stands_in_for_absent_positions(tmp_path):
    state = published(tiny_dit())
    del state["pos_embed"]
    path = saved(state, tmp_path)
    with pytest.raises(ValueError, match=r"input_size must be given \(--input-size\)"):
        import_checkpoint(path, num_heads=2, **MIT)
    assert import_checkpoint(path, num_heads=2, input_size=8, **MIT).config.network.input_size == 8


# --- the licence


def test_a_licence_is_kept_without_a_warning(tmp_path, caplog):
    path = saved(published(tiny_dit()), tmp_path)
    config = ImportConfig(source=path, output=tmp_path / "model", num_heads=2, license="mit")
    run_import(config)
    assert RemixDiT.from_pretrained(tmp_path / "model").config.license == "mit"
    assert not caplog.records


def test_the_licence_of_the_released_weights_is_assumed_with_a_warning(tmp_path, caplog):
    path = saved(published(tiny_dit()), tmp_path)
    run_import(ImportConfig(source=path, output=tmp_path / "model", num_heads=2))
    assert RemixDiT.from_pretrained(tmp_path / "model").config.license == "cc-by-nc-4.0"
    assert "\nlicense: cc-by-nc-4.0\n" in (tmp_path / "model" / "README.md").read_text()
    assert "cc-by-nc-4.0" in caplog.text
    assert "--license" in caplog.text


# --- refusals


class Creates:
    """Its unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


class Evaluates(Creates):
    """Its unpickling evaluates an expression."""

    def __reduce__(self) -> tuple:
        return (eval, (f"open({str(self.path)!r}, 'w').close()",))


@pytest.mark.parametrize("payload", [Creates, Evaluates])
@pytest.mark.parametrize("kind", ["zip", "old", "pickle", "in arguments"])
def test_a_file_that_would_run_code_is_refused_and_nothing_runs(kind, payload, tmp_path):
    sign, path = tmp_path / "sign", tmp_path / "given.pt"
    evil, content = payload(sign), published(tiny_dit())
    if kind == "pickle":
        path.write_bytes(pickle.dumps(evil))
    elif kind == "in arguments":
        torch.save({"model": content, "args": argparse.Namespace(evil=evil)}, path)
    else:
        content = {"model": content, "opt": evil}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    output = tmp_path / "model"
    with pytest.raises(ValueError, match="nothing that runs code") as refusal:
        run_import(ImportConfig(source=path, output=output, num_heads=2, license="mit"))
    assert "\n" not in str(refusal.value)
    assert not sign.exists()
    assert not output.exists()
    if kind != "pickle":  # the payload is a real one
        torch.load(path, weights_only=False)
        assert sign.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut short"])
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    for name in ("given.pt", "given.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint must"):
            import_checkpoint(tmp_path / name)


def test_a_path_without_a_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent.pt"):
        with pytest.raises(ValueError, match="checkpoint must be a file"):
            import_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"model": {"a": 3}}, {"step": 3}])
def test_a_file_without_a_state_dict_is_refused(content, tmp_path):
    with pytest.raises(ValueError, match="checkpoint must hold a state dict"):
        import_checkpoint(saved(content, tmp_path))


def without(state, name):
    state.pop(name)


def test_wrong_tensors_are_refused_by_name(tmp_path):
    changes = {
        r"missing blocks\.1\.attn\.proj\.bias": lambda s: without(s, "blocks.1.attn.proj.bias"),
        r"extra blocks\.1\.attn\.q_norm": lambda s: s.update(
            {"blocks.1.attn.q_norm": torch.ones(2)}
        ),
        r"misshaped blocks\.0\.mlp\.fc2\.bias \(3,\) instead of \(16,\)": lambda s: s.update(
            {"blocks.0.mlp.fc2.bias": torch.ones(3)}
        ),
        "missing blocks.6": lambda s: s.update({"blocks.9.mlp.fc1.bias": torch.ones(64)}),
        "not of floats x_embedder.proj.bias": lambda s: s.update(
            {"x_embedder.proj.bias": torch.ones(16, dtype=torch.int32)}
        ),
        r"x_embedder\.proj\.weight must have 4 axes, got no such tensor": lambda s: without(
            s, "x_embedder.proj.weight"
        ),
        "final_layer.linear.bias must have 4 numbers, or twice": lambda s: s.update(
            {"final_layer.linear.bias": torch.ones(12)}
        ),
        "pos_embed must be the fixed sines": lambda s: s["pos_embed"].mul_(0.9),
    }
    for message, change in changes.items():
        state = published(tiny_dit(depth=6))
        change(state)
        with pytest.raises(ValueError, match=message) as refusal:
            import_checkpoint(saved(state, tmp_path), num_heads=2, **MIT)
        assert "\n" not in str(refusal.value)


def test_what_shapes_do_not_tell_is_asked_for(tmp_path):
    path = saved(published(tiny_dit()), tmp_path)
    with pytest.raises(ValueError, match=r"num_heads must be given \(--num-heads\)"):
        import_checkpoint(path)
    with pytest.raises(ValueError, match="multiple of 4 and of num_heads 3"):
        import_checkpoint(path, num_heads=3)
    with pytest.raises(ValueError, match="input_size must be that of pos_embed, 16 tokens"):
        import_checkpoint(path, num_heads=2, input_size=16)
    with pytest.raises(ValueError, match="class_names must be 3 names, got 1"):
        import_checkpoint(path, num_heads=2, class_names=("cat",), **MIT)


def test_counts_that_mean_nothing_are_refused(tmp_path):
    path = saved(published(tiny_dit()), tmp_path)
    for counts, message in {
        (3, None): "must be given together, got 3 and None",
        (0, 4): "num_bases must be at least 1, got 0",
        (2, 0): "num_experts must be at least 1, got 0",
        (5, 4): "num_bases must be at most num_experts 4, got 5",
    }.items():
        with pytest.raises(ValueError, match=message):
            import_checkpoint(path, num_heads=2, num_bases=counts[0], num_experts=counts[1], **MIT)
    path = saved(published_remix(remixed(2, 4)), tmp_path)
    with pytest.raises(ValueError, match="must be those of the Remix-DiT, 2 and 4, got 3 and 4"):
        import_checkpoint(path, num_heads=2, num_bases=3, num_experts=4, **MIT)


def test_an_output_that_holds_anything_is_left_alone(tmp_path):
    path = saved(published(tiny_dit()), tmp_path)
    output = tmp_path / "model"
    config = ImportConfig(source=path, output=output, num_heads=2, license="mit")
    output.mkdir()  # an empty one will do
    run_import(config)
    assert sorted(p.name for p in output.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    before = (output / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match="output must be a new or an empty directory"):
        run_import(config)
    assert (output / "model.safetensors").stat().st_mtime_ns == before


def test_an_output_that_cannot_be_written_is_refused(tmp_path):
    path = saved(published(tiny_dit()), tmp_path)
    for output in (path, path / "model"):
        with pytest.raises(ValueError, match="output must be a"):
            run_import(ImportConfig(source=path, output=output, num_heads=2, license="mit"))


def write_half(output: Path) -> None:
    with new_directory(output) as beside:
        (beside / "half").write_text("written")
        raise RuntimeError("cut short")


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_nothing_half_written(exists, tmp_path):
    output = tmp_path / "model"
    if exists:
        output.mkdir()
    with pytest.raises(RuntimeError, match="cut short"):
        write_half(output)
    assert list(tmp_path.rglob("*")) == ([output] if exists else [])


# --- exports


@pytest.mark.parametrize("shape", SHAPES)
def test_an_exported_dit_imports_as_it_was(shape, tmp_path):
    model = remixed(3, 5, **shape)
    path = export_dit(model, tmp_path / "out", expert=3)
    state = load_file(path)
    assert torch.equal(state["pos_embed"], model.network.pos_embed)
    found = import_checkpoint(path, **MIT)  # num_heads stands in the file's header
    assert found.config.network.num_heads == 2
    assert equal_states(found.expert(0), model.expert(3))


def test_a_licence_survives_export_and_import(tmp_path, caplog):
    model = import_checkpoint(
        saved(published(tiny_dit()), tmp_path), num_heads=2, license="cc-by-4.0"
    )
    path = export_dit(model, tmp_path / "out")
    assert import_checkpoint(path).config.license == "cc-by-4.0"
    assert not caplog.records


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
def test_what_a_model_states_survives_export_and_import(prediction_type, tmp_path):
    facts = {
        "prediction_type": prediction_type,
        "num_train_timesteps": 250,
        "class_names": ("cat", "dög", "elk"),
        "autoencoder": {"name": "kl", "digest": "1234"},
        "license": "mit",
    }
    model = RemixDiT.from_dit(tiny_dit(learn_sigma=False), 1, 1, **facts)
    back = import_checkpoint(export_dit(model, tmp_path / "out")).config
    assert {name: getattr(back, name) for name in facts} == facts
    assert back == model.config


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"num_train_timesteps": "1000000000000"}, "num_train_timesteps .* at most 1000000, got"),
        ({"class_names": '["cat", {"a": 2}]'}, "class_names in the file's metadata must be texts"),
    ],
)
def test_facts_that_no_model_has_are_refused(stated, message, tmp_path):
    path = tmp_path / "given.safetensors"
    state = {name: values.contiguous() for name, values in published(tiny_dit()).items()}
    save_file(state, path, {"num_heads": "2", **stated})
    with pytest.raises(ValueError, match=message):
        import_checkpoint(path, **MIT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_before_anything_is_written(value, tmp_path):
    state = published(tiny_dit())
    state["blocks.1.mlp.fc1.weight"][0, 0] = value
    given = saved(state, tmp_path)
    with pytest.raises(ValueError, match=r"blocks.1.mlp.fc1.weight of .* must be finite"):
        run_import(ImportConfig(source=given, output=tmp_path / "out", num_heads=2, **MIT))
    assert not (tmp_path / "out").exists()


def test_exported_experts_say_who_owns_which_timesteps(tmp_path):
    model = remixed(2, 3)
    export_experts(model, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "experts.json").read_text())
    owners = [(entry["begin"], entry["end"]) for entry in index["experts"]]
    assert owners == [(0, 333), (333, 666), (666, 1000)]
    for number, entry in enumerate(index["experts"]):
        found = import_checkpoint(tmp_path / "out" / entry["file"], **MIT)
        assert equal_states(found.expert(0), model.expert(number))


@pytest.mark.parametrize("shape", [{}, SHAPES[0], SHAPES[1], {"in_channels": 4, "input_size": 16}])
def test_diffusers_runs_an_exported_expert_with_equal_output(shape, tmp_path, monkeypatch):
    from diffusers import AutoModel
    from diffusers.utils import dynamic_modules_utils

    from remixdit.interchange.remixdit_transformer import RemixExpertTransformer

    # Trusted code is copied to a cache in the user's home.
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    model = remixed(2, 4, **shape)
    export_diffusers(model, tmp_path / "out", expert=2)
    latents, timesteps, labels = batch(model.network)
    labels[0], timesteps[0] = model.config.network.num_classes, 999  # the null label
    with torch.no_grad():
        expected = model.expert(2).eval()(latents, timesteps, labels)
        for loaded in (
            RemixExpertTransformer.from_pretrained(tmp_path / "out"),
            AutoModel.from_pretrained(str(tmp_path / "out"), trust_remote_code=True),
        ):
            output = loaded.eval()(latents, timestep=timesteps, class_labels=labels).sample
            torch.testing.assert_close(output, expected, **CLOSE)


def test_diffusers_own_class_differs_in_nothing_but_the_embedding_of_timesteps(tmp_path):
    from diffusers import DiTTransformer2DModel

    model = remixed(1, 1)
    export_diffusers(model, tmp_path / "out")
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "out").eval()
    latents, timesteps, labels = batch(model.network)
    with torch.no_grad():
        for times, equal in ((torch.zeros_like(timesteps), True), (timesteps + 1, False)):
            expected = model.network.eval()(latents, times, labels)
            output = loaded(latents, timestep=times, class_labels=labels).sample
            assert torch.allclose(output, expected, **CLOSE) == equal


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1 for diffusers, got 0"),
        ({"mlp_ratio": 2.0}, r"mlp_ratio must be 4 for diffusers, got 2\.0"),
    ],
)
def test_shapes_that_diffusers_does_not_have_are_refused(shape, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_diffusers(remixed(1, 1, **shape), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "file"),
    [("dit", "dit.safetensors"), ("experts", "experts.json"), ("diffusers", "config.json")],
)
def test_a_saved_model_is_exported_in_each_format(name, file, tmp_path):
    remixed(2, 4).save_pretrained(tmp_path / "model")
    expert = None if name == "experts" else 1
    config = {"checkpoint": str(tmp_path / "model"), "format": name, "expert": expert}
    run_export(ExportConfig(**config, output=tmp_path / "out"))
    assert (tmp_path / "out" / file).is_file()
    with pytest.raises(ValueError, match="output must be a new or an empty directory"):
        run_export(ExportConfig(**config, output=tmp_path / "out"))


def test_an_expert_that_is_not_there_is_refused(tmp_path):
    model = remixed(2, 4)
    for expert, found in ((None, "none"), (4, "4"), (-1, "-1")):
        with pytest.raises(ValueError, match=rf"expert must be in \[0, 4\).*got {found}"):
            export_dit(model, tmp_path / "out", expert)
    with pytest.raises(ValueError, match="format must be one of dit, diffusers, experts"):
        ExportConfig(checkpoint="model", output=tmp_path, format="onnx")
    with pytest.raises(ValueError, match="expert must not be given for format experts"):
        ExportConfig(checkpoint="model", output=tmp_path, format="experts", expert=1)
