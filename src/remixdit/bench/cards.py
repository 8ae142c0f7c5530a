"""GPUs, by their data sheets.

Dense bfloat16 products accumulated in float32; NVLink in one direction where the card has it, else
PCIe 4.0 x16; between machines a 400 Gb/s card for each GPU. The share of the peak is an assumption.
"""

import re
from dataclasses import replace
from typing import NamedTuple

from remixdit.bench.scaling import H100, Hardware

__all__ = ["CARDS", "GB", "Card", "card_of"]

GB = 10**9
PCIE = 32e9


class Card(NamedTuple):
    """A GPU."""

    name: str
    """Name of the card whose rates these are."""
    memory_bytes: int
    rates: Hardware


def card(name: str, gigabytes: int, teraflops: float, bandwidth: float, link: float) -> Card:
    """Return a card from the figures of its data sheet."""
    rates = replace(
        H100,
        flops_per_second=teraflops * 1e12,
        memory_bandwidth=bandwidth,
        link_bandwidth=link,
    )
    return Card(name, gigabytes * GB, rates)


# From the least memory to the most; of several with equal memory the first stands for that size.
CARDS = (
    card("RTX-4090", 24, 165.2, 1.008e12, PCIE),
    card("A100-40GB", 40, 312, 1.555e12, 300e9),
    card("L40S", 48, 362, 0.864e12, PCIE),
    Card("H100", 80 * GB, H100),
    card("A100-80GB", 80, 312, 2.039e12, 300e9),
    card("H200", 141, 989, 4.8e12, 450e9),
)


def card_of(text: str) -> Card:
    """Return the GPU that a text means: a name, or its memory, such as 24GB.

    A memory alone gets the rates of the smallest card here that has it, else of the largest.
    """
    for known in CARDS:
        if text.upper() == known.name.upper():
            return known
    found = re.fullmatch(r"(\d+(?:\.\d*)?) ?(GB|GiB)", text, re.IGNORECASE)
    count = float(found[1]) * (GB if found[2].lower() == "gb" else 2**30) if found else 0
    if count < 1:
        names = ", ".join(known.name for known in CARDS)
        raise ValueError(
            f"gpu must be its memory, more than 0 and with a unit such as 24GB, or one of {names}, "
            f"got {text!r}"
        )
    near = next((known for known in CARDS if known.memory_bytes >= count), CARDS[-1])
    return near._replace(memory_bytes=int(count))
