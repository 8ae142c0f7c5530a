"""The variants that a study compares, and the studies: names for sets of them.

A variant is a set of changes to one common run: the same start, the same images, the same steps.
The order of a study is that of its table; the first after the start is the usual baseline. A name
with @ and a factor, such as published@0.25, is a variant at that factor of the learning rate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from remixdit.training.config import MixtureConfig, TrainConfig

__all__ = ["START", "STUDIES", "VARIANTS", "Variant", "chosen_variants", "run_config", "variant"]

START = "start"  # the model that all variants start from; not trained


@dataclass(frozen=True)
class Variant:
    """One way to spend the budget."""

    summary: str
    """Summary in one line."""
    mixture: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `MixtureConfig` other than the study's."""
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `OptimizerConfig` other than the study's."""
    share: float = 1.0
    """Share of the study's steps, and so of its images."""
    learning_rate_factor: float = 1.0
    """Factor of the study's learning rate."""
    stratified: bool = False
    """Whether every batch of a plain DiT is spread evenly over the intervals."""
    num_independent: int = 0
    """Number of plain DiTs, each trained on an interval of its own; 0 for one model."""
    shares_batches: bool = False
    """Whether independent experts get a part of every batch instead of a part of the steps."""
    merges: bool = False
    """Whether the trained experts become one plain network, by the best combination found."""
    first: str = ""
    """Variant that is trained before this one, which starts from its result; none by default."""
    first_share: float = 0.5
    """Share of the budget that the first variant gets."""
    learns_coefficients: bool = False
    """Whether the given bases stay as they are, and only coefficients are learned."""


PLAIN = {"num_bases": 1, "num_experts": 1}
PUBLISHED = {
    "experts_per_step": 1,
    "prior_strength": 1e-4,
    "symmetry": 2.0,
    "intervals": "uniform",
}


def independent(count: int, shares_batches: bool, summary: str) -> Variant:
    """Return experts that share no parameter at all: plain trainings."""
    intervals = {} if shares_batches else {"intervals": "uniform"}
    return Variant(summary, PLAIN | intervals, num_independent=count, shares_batches=shares_batches)


VARIANTS = {
    START: Variant("the pre-trained plain DiT, not trained further"),
    "continued": Variant("the plain DiT, trained further", PLAIN),
    "stratified": Variant(
        "the plain DiT, trained further, timesteps stratified over the intervals",
        PLAIN,
        stratified=True,
    ),
    "stratified-uniform": Variant(
        "the plain DiT, trained further, stratified over intervals of equal width in timesteps",
        PLAIN | {"intervals": "uniform"},
        stratified=True,
    ),
    "stratified-log-snr": Variant(
        "the plain DiT, trained further with adamw, stratified over equal widths in log-SNR",
        PLAIN | {"intervals": "log_snr"},
        {"algorithm": "adamw"},
        stratified=True,
    ),
    "stratified-long": Variant(
        "the stratified plain DiT with a quarter more images", PLAIN, stratified=True, share=1.25
    ),
    "independent": independent(
        8, False, "8 independent experts, one a step: each gets 1/8 of the steps (as published)"
    ),
    "independent-shared": independent(
        8, True, "8 independent experts share every batch: each gets 1/8 of its images"
    ),
    "independent-merged": replace(
        independent(8, True, "the same, then merged into one network (DeMe, arXiv:2410.06664)"),
        merges=True,
    ),
    "independent-learned": Variant(
        "the same for 3/4 of the budget, then coefficients over the 8 frozen networks are learned",
        {"num_bases": 8, "mixed": "all"},
        first="independent-shared",
        first_share=0.75,
        learns_coefficients=True,
    ),
    **{
        f"rank-{rank}": Variant(
            f"low-rank bases of rank {rank} on the frozen start (TimeLoRA, arXiv:2405.03958)",
            {"rank": rank},
        )
        for rank in (4, 16, 64)
    },
    "rank-16-trained": Variant(
        "stratified for half of the budget, then low-rank bases of rank 16 on the frozen result",
        {"rank": 16},
        first="stratified",
    ),
    **{
        f"remix-at-{share}": Variant(
            f"stratified for {share} % of the budget, then the default",
            first="stratified",
            first_share=share / 100,
        )
        for share in (25, 50)
    },
    "one-hot": Variant("each basis serves N/K intervals alone", {"coefficients": "one_hot"}),
    "published": Variant("softmax, one expert a step, the prior from 1e-4 to 0", PUBLISHED),
    "raw": Variant("free coefficients", {"coefficients": "raw"}),
    "per-block": Variant("a table of coefficients for each block", {"per_block": True}),
    "remix": Variant("softmax, all N experts share every batch: the default"),
    "remix-half": Variant("the default, with half of the images", share=0.5),
    "remix-all": Variant("every parameter is mixed", {"mixed": "all"}),
    "uniform": Variant("intervals of equal width in timesteps", {"intervals": "uniform"}),
    "log-snr": Variant("intervals of equal width in log-SNR", {"intervals": "log_snr"}),
    "loss": Variant("intervals of an equal part of the gradient to expect", {"intervals": "loss"}),
    **{f"k{k}": Variant(f"K = {k} bases", {"num_bases": k}) for k in (2, 4, 8, 20)},
    **{f"n{n}": Variant(f"N = {n} experts", {"num_experts": n}) for n in (4, 8, 20, 100, 1000)},
    **{f"m{m}": Variant(f"M = {m} experts a step", {"experts_per_step": m}) for m in (1, 2, 4, 10)},
    **{
        f"prior-{strength:g}": Variant(
            f"the prior from {strength:g} to 0", {"prior_strength": strength}
        )
        for strength in (1e-4, 1e-3, 1e-2)
    },
    "prior-constant": Variant(
        "the prior stays at 1e-3", {"prior_strength": 1e-3, "prior_schedule": "constant"}
    ),
    **{
        f"symmetry-{value:g}": Variant(
            f"preference of {value:g} for the own basis at the start", {"symmetry": value}
        )
        for value in (0.5, 1, 4, 8, 16)
    },
    **{
        f"noise-{noise:g}": Variant(
            f"bases start {noise:g} of their size apart", {"basis_noise": noise}
        )
        for noise in (0.01, 0.1)
    },
    "stratified-muon": Variant(
        "the stratified plain DiT, trained with muon", PLAIN, {"algorithm": "muon"}, stratified=True
    ),
    "remix-muon": Variant("the default, trained with muon", optimizer={"algorithm": "muon"}),
    **{
        f"ema-{decay:g}": Variant(
            f"decay rate {decay:g} of the averages", optimizer={"ema_decay": decay}
        )
        for decay in (0.99, 0.995, 0.998, 0.999, 0.9999)
    },
    **{
        f"coefficients-lr-{rate:g}": Variant(
            f"learning rate {rate:g} of the coefficients",
            optimizer={"coefficients_learning_rate": rate},
        )
        for rate in (0, 1e-3, 1e-1)
    },
}


def named(*prefixes: str) -> tuple[str, ...]:
    """Return the variants whose names begin so."""
    return tuple(name for name in VARIANTS if name.startswith(prefixes))


def at_rates(name: str) -> tuple[str, ...]:
    """Return the names of a variant at other learning rates."""
    return tuple(f"{name}@{factor:g}" for factor in (0.25, 0.5, 2, 4))


def variant(name: str) -> Variant:
    """Return a variant by name, NAME or NAME@FACTOR.

    Raises:
        ValueError: There is none of that name, or the factor is not a number above 0.
    """
    base, at, factor = name.partition("@")
    if base not in VARIANTS:
        known = f"must be among {', '.join(VARIANTS)}"
        raise ValueError(f"variants {known}, got {name!r}{hint(base)}")
    if not at:
        return VARIANTS[base]
    try:
        number = float(factor)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf or base == START:
        raise ValueError(
            f"variants must be trained at a learning rate above 0 (NAME@FACTOR), got {name!r}"
        )
    found = VARIANTS[base]
    summary = f"{found.summary}; at {number:g} of the learning rate"
    return replace(found, summary=summary, learning_rate_factor=number)


# Each ends in the default, so that every table holds it for comparison.
STUDIES = {
    "table2": (
        *(START, "continued", "stratified", "independent", "independent-shared"),
        *("published", "stratified-long", "remix-half", "remix"),
    ),
    "leaderboard": (
        *(START, "continued", "stratified", "independent-shared", "independent-merged"),
        *("independent-learned", "rank-4", "rank-16", "rank-64", "rank-16-trained"),
        *("one-hot", "published", "remix"),
    ),
    "coefficients": (START, "stratified", "one-hot", "raw", "per-block", "remix"),
    "bases": (START, "stratified", "k2", "k8", "k20", "remix"),
    # With N beyond the batch, or M below N, intervals are of equal width: so are those beside them.
    "experts": (START, "stratified", "n4", "n8", "n100", "n1000", "uniform", "remix"),
    "experts-per-step": (
        *(START, "stratified", "stratified-uniform"),
        *("m1", "m2", "m4", "m10", "uniform", "remix"),
    ),
    "mixed": (START, "stratified", "remix-all", "remix"),
    "prior": (START, "stratified", *named("prior-"), "remix"),
    "symmetry": (START, "stratified", *named("symmetry-", "noise-", "coefficients-lr"), "remix"),
    "intervals": (
        *(START, "stratified", "stratified-uniform", "stratified-log-snr"),
        *("uniform", "log-snr", "remix"),
    ),
    "optimizer": (START, "stratified", "stratified-muon", "remix-muon", "remix"),
    "ema": (START, "stratified", *named("ema-"), "remix"),
    "learning-rate": (
        *(START, "stratified", *at_rates("stratified"), "published"),
        *(*at_rates("published"), *at_rates("remix"), "remix"),
    ),
}


def chosen_variants(study: str, names: str) -> tuple[str, ...]:
    """Return the variants of a study: its own, or those named with commas between."""
    if study not in STUDIES:
        raise ValueError(f"study must be one of {', '.join(STUDIES)}, got {study!r}{hint(study)}")
    chosen = tuple(filter(None, (name.strip() for name in names.split(",")))) or STUDIES[study]
    for name in chosen:
        variant(name)
    return chosen


def hint(name: str) -> str:
    """Return a suggestion for a name that does not exist."""
    close = get_close_matches(name, [*STUDIES, *VARIANTS], 1)
    return f"; perhaps {close[0]}" if close else ""


def run_config(variant: Variant, common: TrainConfig) -> TrainConfig:
    """Return the run of a variant.

    Args:
        variant: Changes to the run.
        common: Run of the study, whose mixture holds the study's K, N and M.
    """
    mixture = replace(common.mixture, **variant.mixture)
    # More experts than a batch has images cannot all be in it.
    if (mixture.experts_per_step or mixture.num_experts) > common.batch_size:
        mixture = replace(mixture, experts_per_step=common.batch_size)
    rate = common.optimizer.learning_rate * variant.learning_rate_factor
    objective = common.objective
    if variant.stratified:
        objective = replace(objective, timestep_strata=strata_of(common.mixture, common.batch_size))
    optimizer = replace(common.optimizer, learning_rate=rate, **dict(variant.optimizer))
    if mixture.rank or variant.learns_coefficients:  # no matrices that Muon could move
        optimizer = replace(optimizer, algorithm="adamw")
    return replace(
        common,
        mixture=mixture,
        objective=objective,
        optimizer=optimizer,
        train="coefficients" if variant.learns_coefficients else "all",
    )


def independent_runs(variant: Variant, run: TrainConfig) -> tuple[TrainConfig, ...]:
    """Return the runs in which a variant is trained: one, or one for each independent expert.

    Together they see as many images as one run.
    """
    count = variant.num_independent
    if not count:
        return (run,)
    steps, batch_size = run.steps // count, run.batch_size
    policy = run.mixture.intervals
    if variant.shares_batches:
        # Cut as those of experts that share every batch are.
        steps, batch_size, policy = run.steps, run.batch_size // count, "loss"
    if min(steps, batch_size) < 1:
        raise ValueError(
            f"steps and batch_size must be at least the {count} independent experts, "
            f"got {run.steps} and {run.batch_size}"
        )
    return tuple(
        replace(
            run,
            output_dir=run.output_dir / f"expert-{expert}",
            steps=steps,
            batch_size=batch_size,
            mixture=replace(run.mixture, intervals=policy),
            objective=replace(run.objective, interval=f"{expert}/{count}"),
            output=replace(run.output, save_every=max(1, steps // 2)),
        )
        for expert in range(count)
    )


def strata_of(mixture: MixtureConfig, batch_size: int) -> int:
    """Return the number of intervals over which a plain DiT's timesteps are spread."""
    return min(mixture.num_experts, batch_size)
