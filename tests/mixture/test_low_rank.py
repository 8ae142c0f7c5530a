"""Low-rank bases on a frozen network, against explicitly merged weights."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from remixdit.mixture.experts import Experts
from remixdit.mixture.remix import remix
from remixdit.model.model import RemixDiT
from tests.tiny import batch, tiny_dit

K, N, RANK = 3, 5, 2


def perturb(experts: Experts) -> None:
    """Let bases and coefficients differ, and none be zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for values in (*experts.bases().values(), experts.logits):
            values.add_(0.3 * torch.randn(values.shape, generator=generator))


def merged_state(plain: nn.Module, network: nn.Module, expert: int) -> dict[str, Tensor]:
    """Return the parameters of an expert, differentiable."""
    experts, named = network.experts, dict(network.named_parameters())
    state = {name: named[name] for name, _ in plain.named_parameters()}
    for layer in experts.mixed:
        row = experts.coefficients(expert)[network.get_submodule(layer).table]
        update = torch.einsum("k,kor,kri->oi", row, named[f"{layer}.up"], named[f"{layer}.down"])
        state[f"{layer}.weight"] = named[f"{layer}.weight"] + update
    return state


@pytest.mark.parametrize("options", [{}, {"per_block": True}, {"coefficients": "raw"}], ids=str)
@pytest.mark.parametrize("images", [[0, 0, 1, 1], [4, 0, 3, 3, 1, 0], [2]], ids=str)
def test_outputs_and_gradients_are_those_of_merged_networks(images, options):
    plain = tiny_dit().double()
    network = copy.deepcopy(plain)
    experts = remix(network, K, N, rank=RANK, **options)
    perturb(experts)
    latents, timesteps, labels = batch(plain, len(images))
    latents = latents.double()
    rows = [slice(i, i + 1) for i in range(len(images))]
    expected = torch.cat(
        [
            functional_call(
                plain,
                merged_state(plain, network, expert),
                (latents[i], timesteps[i], labels[i]),
            )
            for i, expert in zip(rows, images, strict=True)
        ]
    )
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).double()
    expected_grads = torch.autograd.grad(expected, trained, cotangent)
    with experts.route(images):
        outputs = network(latents, timesteps, labels)
    torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(
        torch.autograd.grad(outputs, trained, cotangent), expected_grads, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_only_bases_and_logits_are_trained_and_the_start_is_the_network():
    plain = tiny_dit()
    network = copy.deepcopy(plain)
    experts = remix(network, K, N, rank=RANK)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"down", "up", "logits"}
    inputs = batch(plain)
    with experts.route([0, 1, 2, 3, 4, 4]):
        assert torch.equal(network(*inputs), plain(*inputs))


def test_a_plain_expert_is_a_network_of_the_original_classes():
    plain = tiny_dit()
    network = copy.deepcopy(plain)
    experts = remix(network, K, N, rank=RANK)
    perturb(experts)
    inputs = batch(plain)
    for expert in range(N):
        merged = experts.plain(expert)
        assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
        with experts.route([expert] * 6):
            torch.testing.assert_close(merged(*inputs), network(*inputs), rtol=1e-4, atol=1e-5)


def test_a_model_with_low_rank_bases_is_saved_and_samples_as_it_trains(tmp_path):
    model = RemixDiT.from_dit(tiny_dit(), K, N, rank=RANK)
    perturb(model.experts)
    model.save_pretrained(tmp_path)
    loaded = RemixDiT.from_pretrained(tmp_path)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    latents, timesteps, labels = batch(model.network)
    expected = model(latents, timesteps, labels).detach()
    for each in (model, loaded):
        torch.testing.assert_close(
            each.denoise(latents, timesteps, labels), expected, rtol=1e-4, atol=1e-5
        )
    mixed = loaded.denoise(latents, timesteps, labels)
    loaded.precompute()
    assert torch.equal(loaded.denoise(latents, timesteps, labels), mixed)


def tiny_transformers() -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """Return tiny random transformers of diffusers, with inputs of two images."""
    from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, WanTransformer3DModel

    torch.manual_seed(0)
    times = torch.tensor([3, 900])
    images = torch.randn(2, 4, 8, 8)
    small = {"num_attention_heads": 2, "num_layers": 2}
    found = {
        "SD3": (
            SD3Transformer2DModel(
                sample_size=8, in_channels=4, out_channels=4, attention_head_dim=8, **small,
                caption_projection_dim=16, joint_attention_dim=12, pooled_projection_dim=20,
                pos_embed_max_size=8,
            ),
            {"hidden_states": images, "timestep": times,
             "encoder_hidden_states": torch.randn(2, 5, 12),
             "pooled_projections": torch.randn(2, 20)},
        ),
        "PixArt": (
            PixArtTransformer2DModel(
                sample_size=8, in_channels=4, out_channels=8, attention_head_dim=8, **small,
                cross_attention_dim=16, caption_channels=12, use_additional_conditions=False,
            ),
            {"hidden_states": images, "timestep": times,
             "encoder_hidden_states": torch.randn(2, 5, 12)},
        ),
        "Wan": (
            WanTransformer3DModel(
                in_channels=4, out_channels=4, attention_head_dim=12, **small, text_dim=12,
                freq_dim=16, ffn_dim=32, rope_max_seq_len=16,
            ),
            {"hidden_states": torch.randn(2, 4, 2, 8, 8), "timestep": times,
             "encoder_hidden_states": torch.randn(2, 5, 12)},
        ),
    }  # fmt: skip
    for _, inputs in found.values():
        inputs |= {n: v.bfloat16() for n, v in inputs.items() if v.is_floating_point()}
    return found


def test_low_rank_bases_go_on_any_transformer_of_diffusers():
    for name, (network, inputs) in tiny_transformers().items():
        network.to(torch.bfloat16).eval()
        frozen = sum(parameter.numel() for parameter in network.parameters())
        with torch.no_grad():
            expected = network(**inputs, return_dict=False)[0]
        experts = remix(network, 2, 4, rank=1)
        with experts.route([3, 0]):
            outputs = network(**inputs, return_dict=False)[0]
        assert torch.equal(outputs, expected), name
        torch.autograd.backward(outputs.float().square().mean())
        up = {n: p for n, p in experts.bases().items() if n.endswith(".up")}
        assert all(p.dtype == torch.float32 for p in up.values())
        assert sum(float(p.grad.abs().sum()) > 0 for p in up.values() if p.grad is not None) > 4
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        assert trained < frozen / 2, name
        with torch.no_grad():
            assert torch.equal(experts.plain(3)(**inputs, return_dict=False)[0], expected), name


@torch.no_grad()
def test_diffusers_adds_an_expert_as_a_lora():
    pytest.importorskip("peft", reason="reads LoRA files for diffusers")
    for name, (network, inputs) in tiny_transformers().items():
        wide = {n: v.float() if v.is_floating_point() else v for n, v in inputs.items()}
        theirs = copy.deepcopy(network.eval())
        experts = remix(network, K, N, rank=RANK)
        perturb(experts)
        expected = experts.plain(3)(**wide, return_dict=False)[0]
        unchanged = theirs(**wide, return_dict=False)[0]
        weights = experts.lora(3)
        if hasattr(theirs, "load_lora_adapter"):
            theirs.load_lora_adapter(weights, prefix=None)
        else:
            with_lora(theirs, weights)
        found = theirs(**wide, return_dict=False)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=name)
        assert not torch.allclose(unchanged, expected, atol=0.01), name


def with_lora(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a LoRA into a network of a class for which diffusers has no loader."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    rank = K * RANK
    layers = [n.removesuffix(".lora_A.weight") for n in weights if n.endswith("lora_A.weight")]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), network)
    assert not set_peft_model_state_dict(network, weights).unexpected_keys


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank must be at least 0, got -1"),
        ({"rank": 2, "mixed": "*norm*"}, "mixed must match"),
        ({"rank": 2, "mixed": "*bias"}, "mixed must match the weight of a linear with a rank"),
    ],
)
def test_what_has_no_low_rank_is_refused(options, message):
    network = tiny_dit()
    before = {name: p.requires_grad for name, p in network.named_parameters()}
    with pytest.raises(ValueError, match=message):
        remix(network, K, N, **options)
    assert {name: p.requires_grad for name, p in network.named_parameters()} == before


def test_whole_bases_and_other_experts_are_no_lora():
    network = tiny_dit()
    with pytest.raises(ValueError, match=r"rank must be at least 1 for a LoRA, got whole bases of"):
        remix(network, K, N).lora(0)
    with pytest.raises(ValueError, match=r"expert must be in \[0, 5\), got 5"):
        remix(tiny_dit(), K, N, rank=RANK).lora(N)
