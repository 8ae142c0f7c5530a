"""The hours, memory and money of the guides are what `bench.scaling` computes."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from remixdit.bench.scaling import H100, StepCost, step_cost, step_seconds
from remixdit.diffusion.dit import DiTConfig
from remixdit.training.config import MixtureConfig, TrainConfig

DOCS = Path(__file__).parents[2] / "docs"
PLAIN = MixtureConfig(num_bases=1, num_experts=1)
REMIX = MixtureConfig()
STEPS, GPUS, DOLLARS_AN_HOUR = 100_000, 8, 2


def rows(page: str) -> dict[str, list[float]]:
    """Return the numbers of each row of a page's first table of networks."""
    found = re.findall(r"^\| (\w+/2) \| (.*) \|$", (DOCS / page).read_text("utf-8"), re.MULTILINE)
    table: dict[str, list[float]] = {}
    for network, cells in found:
        table.setdefault(network, [float(number) for number in re.findall(r"[\d.]+", cells)])
    return table


def cost(network: str, mixture: MixtureConfig, ranks: int, **options: object) -> StepCost:
    config = TrainConfig(
        data="",
        output_dir=Path(),
        init_from="model",
        network=DiTConfig.named(network),
        mixture=mixture,
        batch_size=256,
        precision="bf16",
        **options,
    )
    return step_cost(config, ranks)


def gigabytes(cost: StepCost) -> float:
    return sum(cost.memory.values()) / 1e9


def hours(cost: StepCost, flops_share: float) -> float:
    hardware = replace(H100, flops_share=flops_share)
    return STEPS * step_seconds(cost, hardware)["step"] / 3600


@pytest.mark.parametrize("network", ["S/2", "B/2", "L/2", "XL/2"])
def test_imagenet_takes_what_its_page_says(network):
    costs = [cost(network, mixture, GPUS) for mixture in (PLAIN, REMIX)]
    times = [hours(cost, share) for cost in costs for share in (0.4, 0.2)]
    dollars = [GPUS * DOLLARS_AN_HOUR * time for time in times]
    stated = rows("imagenet.md")[network]
    assert stated[:2] == pytest.approx([gigabytes(cost) for cost in costs], abs=0.06)
    assert stated[2:6] == pytest.approx(times, rel=0.03)
    assert stated[6:] == pytest.approx(dollars, abs=0.51)  # whole dollars


@pytest.mark.parametrize("network", ["S/2", "B/2", "L/2", "XL/2"])
def test_one_gpu_holds_what_its_page_says(network):
    mixtures = (PLAIN, REMIX, replace(REMIX, rank=16))
    small = {"micro_batch_size": 32, "recompute": True}
    expected = [gigabytes(cost(network, mixture, 1, **small)) for mixture in mixtures]
    assert rows("fine-tune.md")[network] == pytest.approx(expected, abs=0.06)
