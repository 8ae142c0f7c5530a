"""A shuffled order of n images, computed instead of stored.

A Feistel network on a grid of side x side >= n cells, as a pair (left, right) of digits: each round

    left, right = right, (left + hash(key, round, right)) mod side

can be undone, whatever the hash, so it permutes the cells. A cell past n is sent round again until
it falls inside ("cycle walking"), which leaves a permutation of [0, n).
"""

import math

import numpy as np

from remixdit.seeds import hashed, scrambled

__all__ = ["permuted"]

NUM_ROUNDS = 6


def permuted(positions: np.ndarray, num_images: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Return the image at each position of its epoch's shuffled order.

    Args:
        positions: (B,) integers in [0, num_images).
        num_images: Number of images.
        seed: Seed for the order.
        epochs: (B,) integers; every epoch has an order of its own.

    Returns:
        (B,) integers in [0, num_images), all different within an epoch.
    """
    side = math.isqrt(num_images - 1) + 1 if num_images > 1 else 1
    keys = hashed(seed, 0, epochs)
    cells = _shuffled_cells(np.asarray(positions, np.uint64), side, keys)
    while (outside := cells >= num_images).any():
        cells[outside] = _shuffled_cells(cells[outside], side, keys[outside])
    return cells.astype(np.int64)


def _shuffled_cells(cells: np.ndarray, side: int, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(cells, np.uint64(side))
    for number in range(NUM_ROUNDS):
        drawn = scrambled(scrambled(keys ^ np.uint64(number)) ^ right) % np.uint64(side)
        left, right = right, (left + drawn) % np.uint64(side)
    return left * np.uint64(side) + right
