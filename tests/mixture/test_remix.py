"""Any network remixed, against an explicit mixture of plain networks."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from remixdit.mixture.coefficients import initial_table, prior_bases
from remixdit.mixture.experts import Experts
from remixdit.mixture.remix import remix
from tests.tiny import batch, tiny_dit

K, N = 3, 5
# How the images of a batch may be divided among experts.
DIVISIONS = {
    "equal groups": [0, 0, 1, 1, 2, 2, 4, 4],
    "one expert": [3, 3, 3, 3],
    "one image": [2],
    "unequal groups": [0, 1, 1, 1, 3, 3, 4, 4],
    "groups in any order": [4, 4, 0, 0, 2, 2],
    "images in any order": [4, 0, 3, 3, 1, 0, 2],
    "as many experts as images": [0, 1, 2, 3, 4],
}


class Kinds(nn.Module):
    """Layers of every kind that networks for images have; (B, 4, 6, 6) and (B,) labels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.group_norm = nn.GroupNorm(2, 8)
        self.labels = nn.Embedding(7, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 12)
        self.bilinear = nn.Bilinear(12, 8, 6)
        self.no_bias = nn.Linear(6, 8, bias=False)
        self.transposed = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return (B, 4, 12, 12)."""
        maps = F.silu(self.group_norm(self.conv(images)))
        tokens = maps.flatten(2).transpose(1, 2) + self.labels(labels)[:, None]  # (B, 36, 8)
        normed = self.norm(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        # Rows of several images folded into one dimension, as video networks do.
        hidden = F.gelu(self.linear(tokens.flatten(0, 1)))
        mixed = self.bilinear(hidden, tokens.flatten(0, 1))
        tokens = tokens + self.no_bias(mixed).view_as(tokens)
        return self.transposed(tokens.transpose(1, 2).unflatten(2, (6, 6)))


def inputs_of(network: nn.Module, count: int) -> tuple[Tensor, ...]:
    """Return random inputs in float64."""
    generator = torch.Generator().manual_seed(count)
    if isinstance(network, Kinds):
        images = torch.randn(count, 4, 6, 6, generator=generator, dtype=torch.float64)
        return images, torch.randint(7, (count,), generator=generator)
    latents, timesteps, class_labels = batch(network, count)
    return latents.double(), timesteps, class_labels


def scattered(network: nn.Module) -> nn.Module:
    """Return a network in float64 in which no parameter is zero or one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network.double()


def perturb(experts: Experts) -> None:
    """Let bases and coefficients differ."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for values in (*experts.bases().values(), experts.logits):
            values.add_(0.3 * torch.randn(values.shape, generator=generator))


def explicit(
    plain: nn.Module, network: nn.Module, inputs: tuple[Tensor, ...], images: list[int]
) -> Tensor:
    """Run every image through a plain network whose weights autograd mixes, one at a time."""
    experts = network.experts
    named = dict(network.named_parameters(remove_duplicate=False))
    outputs = []
    for i, expert in enumerate(images):
        coefficients = experts.coefficients(expert)
        state = {}
        for name, _ in plain.named_parameters(remove_duplicate=False):
            state[name] = named[name]
            if name in experts.mixed_names():
                row = coefficients[table_of(network, name)]
                state[name] = torch.einsum("k,k...->...", row, named[name])
        own = tuple(values[i : i + 1] for values in inputs)
        outputs.append(functional_call(plain, state, own))
    return torch.cat(outputs)


def table_of(network: nn.Module, name: str) -> int:
    """Return the coefficient table of a parameter."""
    for layer in network.experts.mixed:
        if name.startswith(f"{layer}."):
            return network.get_submodule(layer).table
    raise AssertionError(name)


NETWORKS = {
    "dit": (tiny_dit, {}),
    "every parameter of a dit": (tiny_dit, {"mixed": "all"}),
    "a table a block": (tiny_dit, {"per_block": True, "mixed": "all"}),
    "raw": (tiny_dit, {"coefficients": "raw"}),
    "one-hot": (tiny_dit, {"coefficients": "one_hot"}),
    "weights without biases": (tiny_dit, {"mixed": "*attn*weight,*mlp*weight"}),
    "all kinds": (Kinds, {"mixed": "all"}),
}


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_those_of_an_explicit_mixture(name, division):
    build, options = NETWORKS[name]
    plain = scattered(build())
    network = copy.deepcopy(plain)
    experts = remix(network, K, N, **options)
    perturb(experts)
    images = DIVISIONS[division]
    inputs = inputs_of(plain, len(images))
    inputs[0].requires_grad_()

    expected = explicit(plain, network, inputs, images)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).double()
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    leaves = [inputs[0], *trained.values()]
    wanted = torch.autograd.grad(expected, leaves, cotangent, allow_unused=True)

    with experts.route(images):
        found = network(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    got = torch.autograd.grad(found, leaves, cotangent, allow_unused=True)
    for label, ours, theirs in zip(["inputs", *trained], got, wanted, strict=True):
        assert (ours is None) == (theirs is None), label
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=label)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_plain_expert_is_the_mixture_with_all_images_routed_to_it(name):
    build, options = NETWORKS[name]
    network = scattered(build())
    kinds = [type(module) for module in network.modules()]
    names = list(network.state_dict())
    experts = remix(network, K, N, **options)
    perturb(experts)
    inputs = inputs_of(network, 3)
    for expert in range(N):
        plain = experts.plain(expert)
        assert [type(module) for module in plain.modules()] == kinds
        assert list(plain.state_dict()) == names
        with experts.route([expert] * 3):
            expected = network(*inputs)
        torch.testing.assert_close(plain(*inputs), expected, rtol=1e-9, atol=1e-9)
        assert not {id(p) for p in plain.parameters()} & {id(p) for p in network.parameters()}


@pytest.mark.parametrize("coefficients", ["softmax", "raw", "one_hot"])
def test_a_remixed_network_starts_as_the_plain_one(coefficients):
    plain = tiny_dit()
    network = copy.deepcopy(plain)
    experts = remix(network, K, N, coefficients=coefficients, mixed="all")
    inputs = batch(plain)
    with experts.route([0, 1, 2, 3, 4, 4]):
        torch.testing.assert_close(network(*inputs), plain(*inputs))


def test_one_basis_is_the_plain_network_bit_for_bit():
    plain = tiny_dit()
    network = copy.deepcopy(plain)
    remix(network, 1, 1, mixed="all")
    inputs = batch(plain)
    assert torch.equal(network(*inputs), plain(*inputs))


def test_parameters_are_what_is_trained():
    plain = tiny_dit()
    sizes = {name: parameter.numel() for name, parameter in plain.named_parameters()}
    network = copy.deepcopy(plain)
    experts = remix(network, K, N)
    named = dict(network.named_parameters())
    assert named.keys() == {*sizes, "experts.logits"}
    for name, size in sizes.items():
        times = K if name in experts.mixed_names() else 1
        assert named[name].numel() == times * size, name
    blocks = [name for name in sizes if name.startswith("blocks.") and "adaLN" not in name]
    assert list(experts.bases()) == blocks


def test_any_optimizer_trains_it():
    network = tiny_dit()
    experts = remix(network, K, N)
    inputs = batch(network, 10)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        with experts.route([0, 1, 2, 3, 4] * 2):
            loss = network(*inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    first, *others = experts.bases()["blocks.0.mlp.fc1.weight"]
    assert all(not torch.equal(first, other) for other in others)


def copied(network: nn.Module) -> nn.Module:
    """Return a network that a pickle has been through."""
    return pickle.loads(pickle.dumps(network))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copied])
def test_copies_and_pickles_are_networks_of_their_own(duplicate):
    network = tiny_dit()
    experts = remix(network, K, N)
    inputs, images = batch(network, 5), [0, 1, 2, 3, 4]
    with experts.route(images):
        expected = network(*inputs)
    other = duplicate(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    with other.experts.route(images):
        assert torch.equal(other(*inputs), expected)
    assert other.experts.network is other
    assert all(other.get_submodule(name).experts is other.experts for name in experts.mixed)


def test_a_state_dict_goes_into_another_network():
    network, other = tiny_dit(0), tiny_dit(1)
    inputs, images = batch(network, 5), [0, 1, 2, 3, 4]
    for each in (network, other):
        remix(each, K, N)
    perturb(network.experts)
    other.load_state_dict(network.state_dict())
    outputs = []
    for each in (network, other):
        with each.experts.route(images):
            outputs.append(each(*inputs))
    assert torch.equal(*outputs)


def test_moving_changes_the_dtype_of_all():
    network = remix(tiny_dit(), K, N).network.double()
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    inputs = inputs_of(network, 5)
    with network.experts.route([0, 1, 2, 3, 4]):
        assert network(*inputs).dtype == torch.float64


def test_threads_take_turns():
    network = tiny_dit()
    experts = remix(network, K, N)
    perturb(experts)
    inputs = batch(network, 6)
    with torch.no_grad():
        expected = [experts.plain(expert)(*inputs) for expert in range(N)]
    wrong = []

    def work(start: int) -> None:
        for i in range(25):
            expert = (start + i) % N
            with torch.no_grad(), experts.route([expert] * 6):
                found = network(*inputs)
            if not torch.allclose(found, expected[expert], atol=1e-5):
                wrong.append(expert)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Tied(nn.Module):
    """An embedding whose weight also makes the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        """(B, T) => (B, T, 6)."""
        return self.head(self.hidden(self.embed(words)))


def test_tied_parameters_stay_tied():
    network = Tied()
    experts = remix(network, 2, 3, mixed="*")
    assert network.head.weight is network.embed.weight
    assert set(experts.bases()) == {"embed.weight", "hidden.weight", "hidden.bias"}
    perturb(experts)
    words = torch.arange(6).view(3, 2)
    plain = experts.plain(2)
    assert plain.head.weight is plain.embed.weight
    with experts.route([2, 2, 2]):
        torch.testing.assert_close(network(words), plain(words))


def test_tied_parameters_of_which_half_is_named_are_refused():
    with pytest.raises(ValueError, match="all names of a tied parameter or none"):
        remix(Tied(), 2, 3, mixed="head.*")


def test_a_tied_layer_that_is_not_mixed_stays_tied_in_plain_experts():
    experts = remix(Tied(), 2, 3, mixed="hidden.*")
    plain = experts.plain(0)
    assert plain.head.weight is plain.embed.weight


def test_a_layer_used_twice_is_mixed_once():
    shared = nn.Linear(4, 4)
    network = nn.Sequential(shared, nn.Tanh(), shared)
    experts = remix(network, 2, 3, mixed="all")
    perturb(experts)
    assert network[0] is network[2]
    inputs = torch.randn(3, 4)
    with experts.route([0, 1, 2]):
        found = network(inputs)
    for expert, values in enumerate(inputs):
        torch.testing.assert_close(found[expert], experts.plain(expert)(values))


def test_frozen_parameters_are_shared():
    network = tiny_dit()
    network.blocks[0].requires_grad_(False)
    experts = remix(network, K, N)
    assert not any(name.startswith("blocks.0.") for name in experts.bases())
    assert any(name.startswith("blocks.1.") for name in experts.bases())


def test_running_statistics_are_those_of_the_network():
    network = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    experts = remix(network, 2, 3, mixed="all")
    with experts.route([0, 0, 2, 2]):
        network(torch.randn(4, 4))
    assert network[0].num_batches_tracked == 2
    network.eval()
    plain = experts.plain(0)
    inputs = torch.randn(3, 4)
    with experts.route([0, 0, 0]):
        torch.testing.assert_close(network(inputs), plain(inputs))
    assert not plain.training


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([0, N], r"expert_of_image must be in \[0, 5\), got 0 to 5"),
        ([-1, 0], r"expert_of_image must be in \[0, 5\), got -1 to 0"),
        ([], r"expert_of_image must be \(B,\) integers, got \(0,\)"),
        ([0.5, 1.0], r"expert_of_image must be \(B,\) integers, got \(2,\) torch.float32"),
        ([[0, 1]], r"expert_of_image must be \(B,\) integers, got \(1, 2\)"),
    ],
    ids=str,
)
def test_a_route_that_makes_no_sense_is_refused(images, message):
    experts = remix(tiny_dit(), K, N)
    with pytest.raises(ValueError, match=message), experts.route(images):
        pass


def test_a_network_without_a_route_says_what_it_needs():
    network = tiny_dit()
    experts = remix(network, K, N)
    with pytest.raises(RuntimeError, match="inside `with experts"):
        network(*batch(network))
    with experts.route([0] * 6):
        network(*batch(network))
    with pytest.raises(RuntimeError, match="inside `with experts"):
        network(*batch(network))


def test_a_batch_of_another_size_than_its_route_is_refused():
    network = tiny_dit()
    with (
        remix(network, K, N).route([0, 1, 2, 3]),
        pytest.raises(ValueError, match="each of the 4 images"),
    ):
        network(*batch(network, 6))


class Scaled(nn.Module):
    """A block with a parameter of its own beside its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))


def wrapped(layer: nn.Module) -> nn.Module:
    """Return a network of one layer."""
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("network", "mixed", "message"),
    [
        (wrapped(Scaled()), "all", "got 0.scale of 0, a Scaled with layers of its own"),
        (Scaled(), "scale", "must not match scale, which belongs to the network itself"),
        (wrapped(nn.MultiheadAttention(4, 2)), "all", "0, to be mixed, must have batch_first True"),
        (wrapped(nn.LSTM(4, 4)), "all", "0, to be mixed, must have batch_first True"),
        (
            nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)),
            "attention+mlp",
            r"must match a trainable parameter, got .*; this Sequential has \*.weight, \*.bias",
        ),
        (
            wrapped(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
            "all",
            "must not match 0.bias, which is parametrized",
        ),
        (tiny_dit(), "*.attn.typo.*", "must match a trainable parameter"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_mixed_is_refused_by_name(network, mixed, message):
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=message):
        remix(network, 2, 4, mixed=mixed)
    assert before.keys() == network.state_dict().keys()
    assert not hasattr(network, "experts")


def test_a_network_that_is_refused_is_left_as_it_was():
    """The first layer can be mixed, the second cannot."""
    network = nn.Sequential(nn.Linear(4, 4), Scaled())
    with pytest.raises(ValueError, match=r"got 1\.scale of 1"):
        remix(network, 2, 4, mixed="all")
    assert type(network[0]) is nn.Linear
    assert not network._forward_pre_hooks
    assert network[0](torch.zeros(1, 4)).shape == (1, 4)


def test_a_network_is_remixed_once():
    network = tiny_dit()
    remix(network, 2, 4)
    with pytest.raises(ValueError, match="experts of its own"):
        remix(network, 2, 4)


@pytest.mark.parametrize(
    ("counts", "message"),
    [((0, 4), "num_bases must be at least 1"), ((5, 4), "num_bases must be at most num_experts 4")],
)
def test_counts_that_make_no_sense_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        remix(tiny_dit(), *counts)


@pytest.mark.parametrize(("num_bases", "num_experts"), [(2, 4), (4, 20), (3, 7), (5, 5), (1, 3)])
def test_every_expert_starts_nearest_to_its_own_basis(num_bases, num_experts):
    table = initial_table(num_bases, num_experts, "softmax", 8.0)
    assert torch.equal(table.argmax(1), prior_bases(num_bases, num_experts))
    raw = initial_table(num_bases, num_experts, "raw", 8.0)
    torch.testing.assert_close(raw, table.softmax(1))


def test_layers_answer_as_the_original_ones():
    network = tiny_dit()
    original = network.blocks[0].attn.qkv
    remix(network, K, N)
    layer = network.blocks[0].attn.qkv
    assert layer.in_features == original.in_features
    assert not hasattr(layer, "no_such_thing")
    with pytest.raises(RuntimeError):
        F.linear(torch.zeros(1, original.in_features), layer.weight)  # (K, O, I)


@pytest.mark.parametrize("name", ["dit", "all kinds"])
def test_recomputed_activations_give_the_same_gradients(name):
    build, options = NETWORKS[name]
    network = scattered(build())
    experts = remix(network, K, N, **options)
    perturb(experts)
    inputs, images = inputs_of(network, 6), [4, 0, 3, 0, 1, 1]
    results = []
    for again in (False, True):
        with experts.route(images):
            if again:
                outputs = checkpoint(network, *inputs, use_reentrant=False)
            else:
                outputs = network(*inputs)
            outputs.square().sum().backward()
        results.append([p.grad.clone() for p in network.parameters()])
        network.zero_grad()
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


def test_gradients_after_the_route_has_ended_are_the_same():
    network = tiny_dit()
    network.recompute = True
    experts = remix(network, K, N)
    grads = []
    for inside in (True, False):
        with experts.route([0, 0, 1, 1, 4, 4]):
            loss = network(*batch(network)).square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append([p.grad.clone() for p in network.parameters()])
        network.zero_grad()
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["dit", "every parameter of a dit"])
def test_autocast_rounds_but_changes_nothing_else(name):
    build, options = NETWORKS[name]
    network = build()
    experts = remix(network, K, N, **options)
    perturb(experts)
    inputs, images = batch(network, 6), [0, 1, 1, 2, 4, 4]
    outputs = []
    for enabled in (False, True):
        with experts.route(images), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs.append(network(*inputs).float())
    size = outputs[0].square().mean().sqrt()
    assert 0 < (outputs[1] - outputs[0]).abs().max() < 0.2 * size


def test_gradients_of_a_mixed_linear_are_the_same_inside_of_autocast():
    """Where it would round bases and coefficients, and the gradients that are summed."""
    network = nn.Sequential(nn.Linear(8, 6))
    experts = remix(network, K, N, mixed="all")
    perturb(experts)
    images = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0))
    grads = []
    for inside in (True, False):
        with experts.route([0, 0, 1, 1, 4, 4]):
            with torch.autocast("cpu", torch.bfloat16):
                loss = network(images).float().square().sum()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
        grads.append([p.grad.clone() for p in network.parameters()])
        network.zero_grad()
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))


def test_autocast_rounds_no_coefficients_of_layers_that_run_expert_by_expert():
    network = nn.Sequential(nn.Conv2d(3, 8, 3))
    weight = network[0].weight.detach().clone()
    experts = remix(network, K, N, mixed="all")  # bases are equal, so every mixture is the weight
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network[0].mixed_weight("weight", experts.coefficients(1)[0])
    torch.testing.assert_close(mixed, weight, rtol=1e-6, atol=1e-7)
