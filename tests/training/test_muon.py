"""Muon: against torch's own, the singular value decomposition, and AdamW beside it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from remixdit.mixture.remix import remix
from remixdit.training.config import MixtureConfig, TrainConfig
from remixdit.training.muon import MuonAdamW, orthogonal
from remixdit.training.optimizer import OptimizerConfig, optimizer_of, step_if
from tests.command_line import refusal, remixdit
from tests.processes import launch
from tests.tiny import batch, tiny_dit

MUON = OptimizerConfig(algorithm="muon", learning_rate=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 4, 16), (3, 16, 4)])
def test_singular_values_become_nearly_one_and_singular_vectors_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    inner = left.mT @ orthogonal(matrices).double() @ right.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6
    assert values.max() < 1.25
    torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=1e-4)


def test_the_size_of_a_gradient_does_not_matter():
    matrices = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonal(1e4 * matrices), orthogonal(matrices))
    assert torch.equal(orthogonal(torch.zeros(2, 6, 4)), torch.zeros(2, 6, 4))


def test_plain_matrices_move_as_those_of_the_stock_optimizer():
    """The stock optimizer iterates in bfloat16, and knows nothing of a fused qkv."""
    ours, theirs = tiny_dit(), tiny_dit()
    optimizer = optimizer_of(remix(ours, 1, 1), MUON)
    assert isinstance(optimizer, MuonAdamW)
    named = dict(ours.named_parameters())
    others = dict(theirs.named_parameters())
    moved = [n for n in others if n.startswith("blocks.") and n.endswith(".weight")]
    moved = [n for n in moved if ".attn.proj." in n or ".mlp." in n]
    assert len(moved) == 3 * len(theirs.blocks)
    stock = torch.optim.Muon(
        [others[name] for name in moved],
        lr=1e-2,
        weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in others.items():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient
            named[name].grad = gradient.view_as(named[name]).clone()
        before = {name: others[name].detach().clone() for name in moved}
        stock.step()
        optimizer.step()
        for name in moved:
            change = others[name].detach() - before[name]
            own = named[name].detach().squeeze(0) - before[name]
            assert (own - change).norm() < 0.03 * change.norm() * (step + 1), name


def test_every_basis_moves_as_it_would_alone():
    together, alone = tiny_dit(), tiny_dit()
    optimizers = [optimizer_of(remix(together, 3, 5), MUON), optimizer_of(remix(alone, 1, 1), MUON)]
    ours, theirs = dict(together.named_parameters()), dict(alone.named_parameters())
    generator = torch.Generator().manual_seed(0)
    names = [name for name in theirs if name.startswith("blocks.") and "adaLN" not in name]
    for name in names:
        gradients = torch.randn(ours[name].shape, generator=generator)
        ours[name].grad, theirs[name].grad = gradients, gradients[1:2].clone()
    for optimizer in optimizers:
        optimizer.step()
    for name in names:
        torch.testing.assert_close(ours[name][1], theirs[name][0], rtol=1e-4, atol=1e-6)


def test_a_fused_qkv_is_three_matrices_and_biases_are_adamws():
    network = tiny_dit()
    optimizer = optimizer_of(remix(network, 2, 4), MUON)
    width = network.blocks[0].attn.qkv.weight.shape[-1]
    named = dict(network.named_parameters())
    by_shape = {
        shape: {n for n, p in named.items() for member, _ in members if member is p}
        for shape, members in optimizer.shapes.items()
    }
    assert "blocks.0.attn.qkv.weight" in by_shape[width, width]
    assert "blocks.0.attn.proj.weight" in by_shape[width, width]
    moved = set().union(*by_shape.values())
    assert all(name.endswith(".weight") and "adaLN" not in name for name in moved)
    for name, parameter in named.items():
        if parameter.requires_grad:
            assert ("exp_avg_sq" in optimizer.state[parameter]) is (name not in moved)


def test_a_skipped_step_changes_nothing():
    network = tiny_dit()
    experts = remix(network, 2, 4)
    optimizer = optimizer_of(experts, MUON)
    for step, factor in enumerate((1.0, float("nan"), 1.0)):
        with experts.route([0, 1, 2, 3]):
            output = network(*batch(network, 4, seed=step))
        torch.autograd.backward(output.square().mean() * factor)
        kept = [p.detach().clone() for p in network.parameters()]
        moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
        step_if(torch.tensor(factor == 1.0), optimizer)
        optimizer.zero_grad()
        same = [torch.equal(a, b) for a, b in zip(kept, network.parameters(), strict=True)]
        now = [value for state in optimizer.state.values() for value in state.values()]
        unchanged = all(torch.equal(a, b) for a, b in zip(moments, now, strict=True))
        assert (all(same) and unchanged) is (factor != 1.0)


SHARED_OUT = """
import torch
from remixdit import distributed
from remixdit.training.muon import orthogonal
distributed.start(torch.device("cpu"))
for count in (1, 4, 6):
    matrices = torch.randn(count, 8, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen = []
    def work(rows):
        seen.append(len(rows))
        return orthogonal(rows, torch.bfloat16)
    found = distributed.by_shares(work, matrices)
    assert torch.equal(found, orthogonal(matrices, torch.bfloat16)), count
    assert seen == [{1: 1, 4: 2, 6: 2}[count]], seen
distributed.stop()
"""


def test_three_processes_share_out_the_matrices(tmp_path):
    (tmp_path / "shares.py").write_text(SHARED_OUT)
    launch("", 3, program=f"{tmp_path}/shares.py")


@pytest.mark.parametrize("is_skipped", [False, True])
def test_a_step_that_nobody_waits_for_is_the_same(is_skipped):
    """On a GPU whether the step is skipped is not read, but multiplied by."""
    networks = tiny_dit(), tiny_dit()
    optimizers = [optimizer_of(remix(network, 2, 4), MUON) for network in networks]
    for step in range(2):
        size = float("nan") if is_skipped and step else 1.0
        for network in networks:
            generator = torch.Generator().manual_seed(step)
            for parameter in network.parameters():
                parameter.grad = size * torch.randn(parameter.shape, generator=generator)
        step_if(torch.tensor(size == 1.0), optimizers[0])
        with torch.no_grad():
            for shape, members in optimizers[1].shapes.items():
                optimizers[1]._move(shape, members, torch.tensor(float(size != 1.0)))
    theirs = dict(networks[1].named_parameters())
    for name, parameter in networks[0].named_parameters():
        if name.endswith(".weight") and "exp_avg_sq" not in optimizers[0].state[parameter]:
            own, other = (
                o.state[p] for o, p in zip(optimizers, (parameter, theirs[name]), strict=True)
            )
            assert own["step"] == other["step"] == (1 if is_skipped else 2)
            torch.testing.assert_close(own["exp_avg"], other["exp_avg"])
            torch.testing.assert_close(parameter, theirs[name])


class Attention(nn.Module):
    """A network whose attention has vectors and kernels beside its matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        attention = nn.Module()
        attention.to_q = nn.Linear(8, 8)
        attention.norm_q = nn.LayerNorm(8)
        attention.conv = nn.Conv2d(8, 8, 1)
        self.blocks[0].attn = attention


@pytest.mark.parametrize("num_bases", [1, 3])
def test_vectors_and_kernels_of_attention_are_adamws(num_bases):
    network = Attention()
    optimizer = optimizer_of(remix(network, num_bases, 4), MUON)
    assert list(optimizer.shapes) == [(8, 8)]
    (member,) = optimizer.shapes[8, 8]
    assert member[0] is network.blocks[0].attn.to_q.weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": True}, "algorithm must be adamw with --shard"),
        ({"init_from": "a", "mixture": MixtureConfig(rank=4)}, "adamw with --rank"),
        ({"init_from": "a", "train": "coefficients"}, "adamw with --train coefficients"),
    ],
)
def test_muon_without_matrices_to_train_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(data="", output_dir=Path(), optimizer=MUON, **options)


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ValueError, match="algorithm must be adamw or muon, got 'sgd'"):
        OptimizerConfig(algorithm="sgd")


def test_a_run_from_before_adamw_had_its_own_rate_resumes_with_muons(data, tmp_path, capsys):
    line = f"train tiny --data {data} --algorithm muon --learning-rate 1e-3 --save-every 2"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    remixdit(f"{line} --steps 4 --output-dir {whole} --adamw-learning-rate 1e-3")
    remixdit(f"{line} --steps 2 --output-dir {broken} --adamw-learning-rate 1e-3")
    stated = json.loads((broken / "config.json").read_text())
    del stated["optimizer"]["adamw_learning_rate"]
    (broken / "config.json").write_text(json.dumps(stated))
    again = f"{line} --steps 4 --output-dir {broken}"
    refused = refusal(again, capsys)
    assert "optimizer.adamw_learning_rate" in refused
    assert "0.001" in refused
    remixdit(f"{again} --adamw-learning-rate 1e-3")
    first, second = (load_file(d / "model" / "model.safetensors") for d in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)
