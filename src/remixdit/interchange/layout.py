"""The published layout of the weights of DiT and Remix-DiT.

A DiT's names are those of `remixdit.dit`, and `pos_embed`, the fixed table of positions. In a
Remix-DiT the parameters of attention and MLP have a leading basis axis, and `coefficients.weight`
holds the logits:

    blocks.0.attn.qkv.weight  (3D, D) => (K, 3D, D)        coefficients.weight  (N, K)

Shapes: D hidden size, P patch size, C channels, T tokens, K bases, N experts.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from remixdit.diffusion.dit import SIZES, DiT, DiTConfig, sincos_positions
from remixdit.mixture.names import matches, patterns_of
from remixdit.model.config import RemixConfig

__all__ = [
    "LOGITS",
    "PATCHES",
    "check_shapes",
    "infer_config",
    "load_network",
    "mixed_in",
    "official_state",
    "require_embedding",
    "without_prefix",
]

State = dict[str, Tensor]

LOGITS = "coefficients.weight"
PATCHES = "x_embedder.proj.weight"
# Rounded to bfloat16, sines and cosines are off by up to 2^-9.
POSITION_TOLERANCE = 4e-3


def without_prefix(state: State) -> State:
    """Return the state without what all names begin with, such as "module." or "_orig_mod."."""
    found = [name.removesuffix(PATCHES) for name in state if name.endswith(PATCHES)]
    if len(found) != 1 or not all(name.startswith(found[0]) for name in state):
        return state
    return {name.removeprefix(found[0]): values for name, values in state.items()}


def infer_config(
    state: State, num_heads: int | None = None, input_size: int | None = None
) -> DiTConfig:
    """Return the shape of the network that the weights are of.

    Args:
        state: Under the published names.
        num_heads: Needed for a width that is not a published one: the shapes do not tell it.
        input_size: Needed without `pos_embed`, whose number of tokens tells it.
    """
    width, in_channels, patch_size, _ = parameter_shape(state, PATCHES, 4)
    mlp_width = parameter_shape(state, "blocks.0.mlp.fc1.bias", 1, 2)[-1]
    outputs, one_output = parameter_shape(state, "final_layer.linear.bias", 1)[0], patch_size**2
    if outputs not in (one_output * in_channels, 2 * one_output * in_channels):
        raise ValueError(
            f"final_layer.linear.bias must have {one_output * in_channels} numbers, or twice as "
            f"many for a learned variance, got {outputs}"
        )
    table = "y_embedder.embedding_table.weight"
    return DiTConfig(
        input_size=latent_size(state, patch_size, input_size),
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=width,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_heads=published_num_heads(width) if num_heads is None else num_heads,
        mlp_ratio=exact_mlp_ratio(mlp_width, width),
        num_classes=parameter_shape(state, table, 2)[0] - 1 if table in state else 0,
        learn_sigma=outputs == 2 * one_output * in_channels,
    )


def parameter_shape(state: State, name: str, *axes: int) -> tuple[int, ...]:
    """Return the shape of a tensor that must be there, with one of the numbers of axes."""
    shape = tuple(state[name].shape) if name in state else None
    if shape is None or len(shape) not in axes or 0 in shape:
        raise ValueError(
            f"checkpoint must be of a DiT: {name} must have "
            f"{' or '.join(str(number) for number in axes)} axes, got {shape or 'no such tensor'}"
        )
    return shape


def published_num_heads(width: int) -> int:
    """Return the number of heads of the published size of a width."""
    published = {hidden_size: heads for _, hidden_size, heads in SIZES.values()}
    if width not in published:
        raise ValueError(
            f"num_heads must be given (--num-heads): hidden_size {width} is of no published size, "
            "and the shapes do not tell it, got none"
        )
    return published[width]


def exact_mlp_ratio(mlp_width: int, width: int) -> float:
    """Return the `mlp_ratio` for which int(width * mlp_ratio) is `mlp_width`."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)


def latent_size(state: State, patch_size: int, given: int | None) -> int:
    """Return height and width of the latents, from the number of tokens in `pos_embed`."""
    if "pos_embed" not in state:
        if given is None:
            raise ValueError(
                "input_size must be given (--input-size): the checkpoint has no pos_embed, got none"
            )
        return given
    tokens = parameter_shape(state, "pos_embed", 3)[1]
    found = math.isqrt(tokens) * patch_size
    if math.isqrt(tokens) ** 2 != tokens or given not in (None, found):
        raise ValueError(
            f"input_size must be that of pos_embed, {tokens} tokens of patch_size {patch_size}, "
            f"got {given if given is not None else 'no square'}"
        )
    return found


def mixed_in(config: DiTConfig) -> set[str]:
    """Return the names that have a basis axis in a published Remix-DiT."""
    patterns = patterns_of("attention+mlp")
    return {name for name, _ in skeleton(config).named_parameters() if matches(name, patterns)}


def skeleton(config: DiTConfig) -> DiT:
    """Return a network that has names and shapes, but no weights."""
    with torch.device("meta"):
        return DiT(config)


def load_network(state: State, config: DiTConfig) -> DiT:
    """Return the network of given weights; none are drawn, which takes long for a large one."""
    network = skeleton(config)
    network.load_state_dict({n: v for n, v in state.items() if n != "pos_embed"}, assign=True)
    side = config.input_size // config.patch_size
    network.pos_embed = sincos_positions(config.hidden_size, side)[None]
    return network


def check_shapes(state: State, config: DiTConfig) -> None:
    """Refuse missing, extra and misshaped tensors, and positions that are not ours."""
    expected = {name: tuple(v.shape) for name, v in skeleton(config).state_dict().items()}
    if LOGITS in state:
        num_experts, num_bases = parameter_shape(state, LOGITS, 2)
        bases = {name: (num_bases, *expected[name]) for name in mixed_in(config)}
        expected = {**expected, **bases, LOGITS: (num_experts, num_bases)}
    found = {name: tuple(values.shape) for name, values in state.items() if name != "pos_embed"}
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "extra": sorted(found.keys() - expected.keys()),
        "misshaped": [
            f"{name} {found[name]} instead of {expected[name]}"
            for name in sorted(expected.keys() & found.keys())
            if found[name] != expected[name]
        ],
        "not of floats": sorted(n for n, values in state.items() if not values.is_floating_point()),
    }
    listed = [f"{fault} {some(names)}" for fault, names in faults.items() if names]
    if listed:
        raise ValueError(
            f"checkpoint must hold a DiT of hidden_size {config.hidden_size}, depth "
            f"{config.depth} and patch_size {config.patch_size}: {'; '.join(listed)}"
        )
    check_positions(state, config)


def check_positions(state: State, config: DiTConfig) -> None:
    """Refuse a `pos_embed` that is not the fixed table of sines and cosines."""
    if "pos_embed" not in state:
        return
    side = config.input_size // config.patch_size
    expected, found = sincos_positions(config.hidden_size, side)[None], state["pos_embed"].float()
    if found.shape != expected.shape or (found - expected).abs().max() > POSITION_TOLERANCE:
        raise ValueError(
            f"pos_embed must be the fixed sines and cosines of {side} x {side} patches, got "
            f"other values of shape {tuple(found.shape)}"
        )


def some(names: Iterable[str], limit: int = 4) -> str:
    """List the first few names."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def official_state(network: DiT) -> State:
    """Return the weights of a network under the published names, with `pos_embed`."""
    return {**network.state_dict(), "pos_embed": network.pos_embed}


def require_embedding(config: RemixConfig, *allowed: str) -> None:
    """Refuse a model whose timesteps other code would embed in another way."""
    kind = config.network.timestep_embedding
    if kind not in allowed:
        raise ValueError(
            f"timestep_embedding must be {' or '.join(allowed)} for this format, whose readers "
            f"embed timesteps so, got {kind}"
        )
