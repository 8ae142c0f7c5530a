"""What a network costs: floating-point operations, counted as two a multiply-add.

Counted are matrix products and convolutions, as `torch.utils.flop_counter` does; what is
elementwise, the mix of weights too, is bound by memory.

Shapes: T tokens, D hidden size, P patch size.
"""

from remixdit.dit import FREQUENCY_SIZE, DiTConfig

__all__ = ["forward_flops", "training_flops"]


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
    """Return the operations of one training step: back-propagation takes twice the forward."""
    return 3 * batch_size * forward_flops(config)
