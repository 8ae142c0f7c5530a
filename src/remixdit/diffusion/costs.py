"""What a network costs: floating-point operations, and the activations kept for the backward pass.

A multiply-add counts as two operations. Matrix products and convolutions are counted, as
`torch.utils.flop_counter` does; elementwise work and the mixing of weights are bound by memory.

Shapes: T tokens, D hidden size, P patch size.
"""

from remixdit.diffusion.dit import FREQUENCY_SIZE, DiTConfig

__all__ = ["activation_bytes", "block_activation_bytes", "forward_flops", "training_flops"]


def forward_flops(config: DiTConfig) -> int:
    """Return the operations for one image, forward."""
    tokens, width = config.num_tokens, config.hidden_size
    hidden, patch = int(width * config.mlp_ratio), config.patch_size**2
    embed = tokens * width * config.in_channels * patch + width * (FREQUENCY_SIZE + width)
    linears = tokens * width * (3 * width + width + 2 * hidden)
    block = linears + 2 * tokens * tokens * width + 6 * width * width
    final = tokens * width * patch * config.out_channels + 2 * width * width
    return 2 * (embed + config.depth * block + final)


def training_flops(config: DiTConfig, batch_size: int = 1) -> int:
    """Return the operations of one training step: the backward pass takes twice the forward."""
    return 3 * batch_size * forward_flops(config)


def activation_bytes(config: DiTConfig, width: int = 4, recompute: bool = False) -> int:
    """Return the bytes that autograd keeps of one image for the backward pass, without a compiler.

    Args:
        config: Shape of the network.
        width: Bytes of a number in the blocks, 4, or 2 under autocast as CUDA does it;
            embedders, norms and the final layer have 4.
        recompute: Only the input of each block is kept.
    """
    tokens, hidden = config.num_tokens, config.hidden_size
    patches = width * tokens * config.in_channels * config.patch_size**2
    labels = 8 if config.num_classes else 0
    # The conditioning in the precision of the blocks, which share it, if that is another.
    cast = width * hidden if width < 4 else 0
    embed = patches + 4 * (FREQUENCY_SIZE + 2 * hidden) + labels + cast
    # The norm's input, output and statistics, and the modulated tokens; then of the conditioning
    # the input of its SiLU, which the blocks share, its output, and 1 + scale.
    final = 4 * tokens * (3 * hidden + 2) + 4 * 3 * hidden
    block = width * tokens * hidden if recompute else block_activation_bytes(config, width)
    return embed + config.depth * block + final


def block_activation_bytes(config: DiTConfig, width: int = 4) -> int:
    """Return the bytes that autograd keeps of one image in one block, with fused attention.

    Of each token: modulated output of both norms, queries, keys and values, attention's output and
    its projection, the MLP's output (8 D), and the hidden layer before and after its GELU. In
    float32: input and output of both norms (4 D), four statistics, and one an attention head.
    """
    tokens, hidden = config.num_tokens, config.hidden_size
    inner = int(hidden * config.mlp_ratio)
    values = tokens * (8 * hidden + 2 * inner) + 9 * hidden  # 9 D: the modulation
    return width * values + 4 * tokens * (4 * hidden + 4 + config.num_heads)
