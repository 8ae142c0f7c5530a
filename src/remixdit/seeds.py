"""Random numbers from (seed, step or index), never from global state.

Whatever is random in the package (initial weights, the expert of a step, timesteps, noise, dropped
labels, samples) is drawn from a generator made here. The same coordinates give the same numbers
whatever ran before, on however many processes.
"""

import hashlib

import torch

__all__ = ["generator_for", "seed_for"]


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
