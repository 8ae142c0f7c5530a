"""What fits a GPU: the numbers are those of `scaling`, and what is said to fit does."""

import re
import shlex
from dataclasses import replace
from itertools import pairwise

import pytest

from remixdit.bench.cards import CARDS, GB, card_of
from remixdit.bench.config import shape_named
from remixdit.bench.planning import PREFERRED, PlanConfig, make_plans
from remixdit.bench.scaling import step_cost, step_seconds
from remixdit.cli.main import main
from remixdit.cli.train import config_of
from remixdit.model.model import RemixDiT
from remixdit.training.config import MixtureConfig, TrainConfig
from tests.command_line import json_result, refusal, remixdit, save_model
from tests.tiny import tiny_dit

NETWORK = "768x2/2"
SIZES = (0.8, 1, 1.5, 2, 3, 4, 8, 80)


def planned(gigabytes: float, **changes: object) -> PlanConfig:
    return PlanConfig(**{"network": NETWORK, "gpu": f"{gigabytes}GB", **changes})


@pytest.mark.parametrize("gpus", [1, 8, 16])
def test_memory_and_speed_are_those_of_scaling(gpus):
    found = make_plans(planned(24, gpus=gpus))
    for plan in found.plans:
        run = TrainConfig(
            data="",
            output_dir=plan.run.output_dir,
            network=shape_named(NETWORK, 32),
            precision="bf16",
            mixture=MixtureConfig(
                num_bases=plan.run.mixture.num_bases, num_experts=plan.run.mixture.num_experts
            ),
            micro_batch_size=plan.run.micro_batch_size,
            recompute=plan.run.recompute,
            shard=plan.run.shard,
            shard_size=plan.run.shard_size,
        )
        cost = step_cost(run, gpus)
        assert plan.cost == cost
        seconds = step_seconds(cost, found.card.rates)["step"]
        assert plan.images_per_second == pytest.approx(256 / seconds)


@pytest.mark.parametrize("gpus", [1, 8])
def test_what_is_said_to_fit_fits(gpus):
    for size in SIZES:
        found = make_plans(planned(size, gpus=gpus, batch_size=64))
        assert found.budget_bytes < size * GB
        assert found.plans[0].fits
        for plan in found.plans:
            assert plan.fits == (sum(plan.cost.memory.values()) <= found.budget_bytes)


@pytest.mark.parametrize("gpus", [1, 8])
def test_more_memory_never_gives_a_smaller_plan(gpus):
    rates = card_of("H100").rates
    bases, seconds = [], {}
    for size in SIZES:
        best = make_plans(planned(size, gpus=gpus, batch_size=64)).plans[0]
        bases.append(best.run.mixture.num_bases)
        seconds.setdefault(bases[-1], []).append(step_seconds(best.cost, rates)["step"])
    assert bases == sorted(bases)
    assert set(bases) <= set(PREFERRED)
    assert max(bases) == 4
    for times in seconds.values():  # a simpler way may take a tenth longer than the fastest
        assert all(later <= 1.21 * earlier for earlier, later in pairwise(times))


def test_little_memory_takes_what_saves_memory():
    small, large = (make_plans(planned(size, gpus=8)).plans[0].run for size in (0.8, 80))
    assert small.shard
    assert (large.shard, large.recompute, large.micro_batch_size) == (False, False, 0)


def test_a_given_speed_scales_all_hours():
    computed, given = (
        make_plans(planned(24, images_per_second=speed)).plans for speed in (0.0, 100.0)
    )
    assert given[0].images_per_second == pytest.approx(100)
    ratios = [
        g.images_per_second / c.images_per_second for g, c in zip(given, computed, strict=True)
    ]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


@pytest.mark.parametrize(
    ("text", "count"), [("24GB", 24e9), ("24 gb", 24e9), ("1.5GiB", 1.5 * 2**30)]
)
def test_memory_is_read_with_its_unit(text, count):
    assert card_of(text).memory_bytes == count


def test_a_card_stands_for_its_memory():
    assert [card_of(known.name.lower()) for known in CARDS] == list(CARDS)
    assert card_of("30GB").name == "A100-40GB"
    assert card_of("80GB").rates == card_of("H100").rates
    assert card_of("500GB").name == "H200"


@pytest.mark.parametrize(
    "line", ["--gpu 4GB", "--gpu 80GB --gpus 8", "--gpu 3GB --gpus 16 --num-experts 8"]
)
def test_the_printed_command_is_the_plan(line, capsys):
    line = f"plan --network S/2 {line} --images 1e6x2"
    facts = json_result(line, capsys)
    remixdit(line)
    printed = capsys.readouterr()
    assert "All of this is computed, and no GPU has run it." in printed.out
    words = shlex.split(printed.err.splitlines()[-1])
    config = config_of(words[words.index("train") + 1 :])
    best = facts["plans"][0]
    assert config.steps == facts["steps"] == 7813
    assert config.mixture.num_bases == best["num_bases"]
    gpus = int(re.search(r"--gpus (\d+)", line + " --gpus 1")[1])
    assert step_cost(config, gpus).memory == best["memory"]
    assert ("torchrun" in words[0]) == (gpus > 1)


def test_a_model_is_planned_with_its_own_shape(tmp_path, capsys):
    network = tiny_dit()
    RemixDiT.from_dit(network, 1, 1).save_pretrained(tmp_path / "my model")
    assert main(["plan", "--network", f"{tmp_path}/my model", "--gpu", "24GB"]) == 0
    words = shlex.split(capsys.readouterr().err.splitlines()[-1])
    config = config_of(words[words.index("train") + 1 :])
    assert config.init_from == f"{tmp_path}/my model"
    best = make_plans(planned(24, network=config.init_from)).plans[0]
    assert step_cost(replace(config, network=network.config)).memory == best.cost.memory


def test_a_mixture_is_no_plain_model(tmp_path, capsys):
    save_model(tmp_path / "mixture", 0)
    message = refusal(f"plan --network {tmp_path}/mixture --gpu 24GB", capsys)
    assert message == f"network must be a plain DiT, got {tmp_path}/mixture of 5 experts"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--network XXL --gpu 24GB", "network must be one of S/2, B/2, L/2, XL/2 .*, got 'XXL'"),
        ("--network L/2 --gpu 24", "gpu must be its memory, .* unit such as 24GB, .*, got '24'"),
        ("--network L/2 --gpu 0GB", "gpu must be its memory, more than 0 .*, got '0GB'"),
        ("--network L/2 --gpu -24GB", "gpu must be its memory, more than 0 .*, got '-24GB'"),
        ("--network L/2 --gpu 24GB --gpus 12", "gpus must be 1 to 8, or a multiple of 8, got 12"),
        ("--network L/2 --gpu 24GB --gpus 3", "batch_size must be a multiple .*, got 256"),
        ("--network L/2 --gpu 24GB --images 1k", "images must be a number .*, got '1k'"),
        ("--network L/2 --gpu 24GB --images 0", "images must be a number .*, got '0'"),
        ("--network L/2 --gpu 24GB --image-size 250", "image_size must be .* of 8, got 250"),
        ("--network XL/2 --gpu 4GB", "gpu must have at least [0-9.]+GB for .*, got 4GB.*"),
    ],
)  # fmt: skip
def test_wrong_requests_get_one_sentence(options, sentence, capsys):
    assert re.fullmatch(sentence, refusal(f"plan {options}", capsys))


def test_what_is_said_to_be_enough_is_enough():
    with pytest.raises(ValueError, match="gpu must have at least") as refused:
        make_plans(planned(0.1))
    least = float(re.search(r"at least ([\d.]+)GB", str(refused.value))[1])
    assert make_plans(planned(least)).plans[0].fits
    with pytest.raises(ValueError, match="gpu must have at least"):
        make_plans(planned(least - 0.2))
