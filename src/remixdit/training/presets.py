"""Named training runs.

Each is a set of changes to the defaults of `TrainConfig`, with its result. The
numbers of the paper (arXiv:2412.05628) are FID on ImageNet 256x256 with guidance 1.5; a number
counts as measured only if this package produced it. All presets draw grids of samples at the start,
in the middle and at the end, where what decodes latents is on the machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from remixdit.diffusion.dit import DiTConfig
from remixdit.training.config import MixtureConfig, ObjectiveConfig, OutputConfig, TrainConfig
from remixdit.training.optimizer import OptimizerConfig

__all__ = ["PRESETS", "Preset", "check_start", "preset", "train_config"]


@dataclass(frozen=True)
class Preset:
    """A named training run."""

    summary: str
    """Summary in one line."""
    result: str
    """Result, measured or published."""
    settings: Mapping[str, Any]
    """Fields of `TrainConfig` other than its defaults."""
    fine_tunes: bool = False
    """Whether the run must start from a given model."""


FINE_TUNING = OptimizerConfig(learning_rate=2e-5)
PLAIN = MixtureConfig(num_bases=1, num_experts=1)
# A grid costs about as much as a step of 256 images: its 16 images take 25 forward passes.
PICTURES = OutputConfig(sample_every=None, sample_inference_steps=25)
NOT_MEASURED = "not measured"
S2 = DiTConfig.named("S/2")


def remixed(size: str, published: str) -> Preset:
    """Return the fine-tuning of a published size, on GPUs, all experts in every step."""
    return Preset(
        f"fine-tune a pre-trained DiT-{size} (--from) into K = 4, N = 20, all experts every step",
        f"not measured; published, with one expert a step: {published}",
        {
            "network": DiTConfig.named(size),
            "optimizer": FINE_TUNING,
            "precision": "bf16",
            "output": PICTURES,
        },
        fine_tunes=True,
    )


def fine_tuned_s2(summary: str, result: str = NOT_MEASURED, **changes: Any) -> Preset:
    """Return the fine-tuning of a pre-trained DiT-S/2 with another mixture."""
    return Preset(
        f"fine-tune a DiT-S/2 (--from): {summary}",
        result,
        {
            "network": S2,
            "optimizer": FINE_TUNING,
            "precision": "bf16",
            "output": PICTURES,
            **changes,
        },
        fine_tunes=True,
    )


SMALL = DiTConfig(
    input_size=16, patch_size=4, hidden_size=96, depth=4, num_heads=3, in_channels=3, num_classes=10
)

PRESETS = {
    "tiny": Preset(
        "seconds on a CPU, for tests: a network of 32 x 2 on images of 16 pixels, K = 2, N = 4",
        "proves that the commands run; learns little",
        {
            "network": DiTConfig(
                input_size=16, patch_size=4, hidden_size=32, depth=2, num_heads=2, in_channels=3
            ),
            "mixture": MixtureConfig(num_bases=2, num_experts=4),
            "optimizer": OptimizerConfig(learning_rate=1e-3),
            "output": replace(
                PICTURES,
                log_every=5,
                save_every=10,
                tensorboard=False,
                sample_images=8,
                sample_inference_steps=5,
            ),
            "steps": 20,
            "batch_size": 16,
        },
    ),
    "pixels-small": Preset(
        "from scratch on pixels of 32 x 32, such as CIFAR-10: DiT-S/4, K = 4, N = 8, mirrored",
        NOT_MEASURED,
        {
            "network": DiTConfig.named("S/4", in_channels=3, num_classes=10),
            "mixture": MixtureConfig(num_experts=8),
            "objective": ObjectiveConfig(mirror=True),
            "optimizer": OptimizerConfig(learning_rate=2e-4, warmup_steps=1000),
            "output": PICTURES,
        },
    ),
    "pixels-16-plain": Preset(
        "from scratch on pixels of 16 x 16: a plain DiT of 0.7 M parameters, minutes on a CPU",
        "CIFAR-10: validation loss 0.04864 (docs/results/cifar10-16)",
        {
            "network": SMALL,
            # As measured, and as pre-trained DiTs are: timesteps spread evenly.
            "mixture": replace(PLAIN, intervals="uniform"),
            "objective": ObjectiveConfig(mirror=True, timestep_strata=20),
            "optimizer": OptimizerConfig(
                learning_rate=2e-3,
                betas=(0.9, 0.99),
                warmup_steps=200,
                lr_schedule="cosine",
                ema_decay=0.998,
            ),
            "output": PICTURES,
            "steps": 6000,
            "batch_size": 256,
            "precision": "bf16",
        },
    ),
    "pixels-16": Preset(
        "fine-tune pixels-16-plain (--from) into K = 4, N = 20, all experts every step",
        "CIFAR-10: loss 0.04568, plain 0.04635 (16x16); 0.02964, plain 0.03053 (32x32)",
        {
            "network": SMALL,
            "objective": ObjectiveConfig(mirror=True),
            "optimizer": OptimizerConfig(
                algorithm="muon", learning_rate=64e-4, warmup_steps=100, ema_decay=0.995
            ),
            "output": PICTURES,
            "steps": 1200,
            "batch_size": 240,  # a multiple of the 20 experts
            "precision": "bf16",
        },
        fine_tunes=True,
    ),
    "s2-plain": Preset(
        "from scratch: the plain DiT-S/2 to start others from, as published",
        NOT_MEASURED,
        {
            "network": S2,
            "mixture": PLAIN,
            "precision": "bf16",
            "output": PICTURES,
            "steps": 400_000,
        },
    ),
    "s2": remixed("S/2", "FID 26.51 -> 22.84"),
    "b2": remixed("B/2", "FID 10.11 -> 9.02"),
    "l2": remixed("L/2", "FID 3.73 -> 3.22"),
    "xl2": remixed("XL/2", "no figure"),
    "published": fine_tuned_s2(
        "the paper's method, one expert a step, its prior",
        "not measured; published: FID 26.51 -> 22.84",
        mixture=MixtureConfig(experts_per_step=1, prior_strength=1e-4, intervals="uniform"),
    ),
    "continued": fine_tuned_s2(
        "the baseline, a plain DiT, with timesteps stratified as those of 20 experts are",
        "not measured; published without strata: FID 26.51 -> 26.05",
        mixture=PLAIN,
        objective=ObjectiveConfig(timestep_strata=20),
    ),
    "independent": fine_tuned_s2(
        "one of 8 experts that share nothing (--interval 0/8 to 7/8), a plain DiT each; "
        "RemixDiT.from_experts puts them together",
        "not measured; published, with 1/8 of the steps for each: FID 26.51 -> 25.00",
        mixture=replace(PLAIN, intervals="uniform"),
        objective=ObjectiveConfig(interval="0/8"),
    ),
    "oracle": fine_tuned_s2(
        "4 bases, each serving 5 of 20 intervals alone (frozen one-hot coefficients)",
        mixture=MixtureConfig(coefficients="one_hot"),
    ),
    "raw": fine_tuned_s2(
        "coefficients free instead of softmax", mixture=MixtureConfig(coefficients="raw")
    ),
    "per-block": fine_tuned_s2(
        "a coefficient table for each block", mixture=MixtureConfig(per_block=True)
    ),
}


def preset(name: str) -> Preset:
    """Return a preset by name."""
    if name not in PRESETS:
        close = get_close_matches(name, PRESETS, 1)
        hint = f"; perhaps {close[0]}" if close else ""
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}{hint}")
    return PRESETS[name]


def check_start(name: str, init_from: str | None) -> None:
    """Refuse to train from scratch at the learning rate of fine-tuning."""
    if preset(name).fine_tunes and not init_from:
        raise ValueError(
            f"--from must name the model that preset {name} fine-tunes, got none; presets that end "
            "in -plain train one, and `remixdit import` reads a published one"
        )


def train_config(
    name: str, *, data: str | Path, output_dir: str | Path, **changes: Any
) -> TrainConfig:
    """Return the run of a preset.

    Args:
        name: Name of the preset.
        data: Shards or images.
        output_dir: Directory of the run.
        changes: Other fields of `TrainConfig`.
    """
    check_start(name, changes.get("init_from"))
    settings = {**preset(name).settings, **changes}
    return TrainConfig(data=str(data), output_dir=Path(output_dir), **settings)
