"""Random numbers from (seed, step or index), never from global state.

Whatever is random in the package (initial weights, the expert of a step, timesteps, noise, dropped
labels, samples) is drawn from a generator made here. The same coordinates give the same numbers
whatever ran before, on however many processes.
"""

import hashlib

import numpy as np
import torch

__all__ = ["generator_for", "hashed", "scrambled", "seed_for"]

WORD = (1 << 64) - 1


def seed_for(seed: int, *coordinates: int | str) -> int:
    """Return 63 well-mixed bits from a seed and the coordinates of one draw.

    Args:
        seed: The user's seed, any integer.
        coordinates: What tells this draw from the others, e.g. `("noise", step)`.
    """
    text = "/".join(str(part) for part in (seed, *coordinates))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator_for(seed: int, *coordinates: int | str, device: str = "cpu") -> torch.Generator:
    """Return a generator seeded by `seed_for(seed, *coordinates)`.

    CPU and CUDA generators draw different numbers: what several processes or devices must agree
    on is drawn on the CPU.
    """
    return torch.Generator(device).manual_seed(seed_for(seed, *coordinates))


def hashed(seed: int, *words: int | np.ndarray) -> np.ndarray:
    """Return 64 random bits for each (seed, *words): one splitmix64 step a word."""
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    bits = np.asarray([seed & WORD], np.uint64)
    for word in words:
        bits = scrambled(bits ^ np.asarray(word).astype(np.uint64))
    return bits


def scrambled(bits: np.ndarray) -> np.ndarray:
    """Splitmix64 (Steele et al. 2014): every bit in changes half the bits out. Wraps at 2**64."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
