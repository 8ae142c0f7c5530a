"""What a study is asked to do."""

from dataclasses import dataclass
from pathlib import Path

from remixdit.study.variants import chosen_variants

__all__ = ["GRID_IMAGES", "StudyConfig"]

GRID_IMAGES = 40  # samples of a cell that its picture shows


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Compare variants at equal budget: the same start, images and steps."""

    name: str
    """Name of the study, one of `variants.STUDIES`."""
    data: str
    """Encoded shards to train on."""
    held_out: str
    """Encoded shards to measure on."""
    init_from: str
    """Plain DiT that every variant starts from."""
    output_dir: Path
    """Directory of cells and report; the same command again resumes the study."""
    variants: str = ""
    """Variants instead of the study's own, comma-separated; NAME@0.25 has a quarter of the rate."""
    seeds: int = 3
    """Number of runs of every variant, each with its own seed."""
    steps: int = 2000
    """Number of optimizer steps of every run."""
    budget: str = "auto"
    """Budget of a run: images, seconds (both) or auto, which is seconds for the leaderboard."""
    batch_size: int = 64
    """Number of images in a step."""
    learning_rate: float = 2e-4
    """Learning rate, unless a variant has its own; with muon, of matrices, a quarter for others."""
    lr_schedule: str = "constant"
    """Schedule of the learning rates: constant or cosine; half-way losses need constant."""
    algorithm: str = "adamw"
    """Optimizer, adamw or muon, unless a variant has its own."""
    beta2: float = 0.999
    """Decay rate of the second moment."""
    ema_decay: float = 0.998
    """Decay rate of the averaged weights, which are measured."""
    num_bases: int = 4
    """Number of bases, K, unless a variant has its own."""
    num_experts: int = 20
    """Number of experts, N, unless a variant has its own."""
    mirror: bool = False
    """Mirror half of the training images left to right."""
    num_held_out: int = 500
    """Number of held-out images for the validation loss, each measured in all 40 intervals."""
    num_samples: int = 0
    """Number of images that every cell samples for the scores; 0 for no scores."""
    num_inference_steps: int = 25
    """Number of sampling steps (DDIM, or Euler for flow matching)."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance; 1 for no guidance."""
    extractor: str = "lite0"
    """Feature extractor of the scores: lite0, inception or dinov2."""
    extractor_weights: str | None = None
    """Weights file of the extractor, if it needs one."""
    seed: int = 0
    """Seed of the first run; the others count up from it."""
    workers: int = 1
    """Number of cells that run at once, each on its share of the cores."""
    device: str = "auto"
    """Device: auto, cpu or cuda. auto is the GPU if there is one."""
    precision: str = "fp32"
    """Precision of the arithmetic: fp32 or bf16."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        chosen_variants(self.name, self.variants)
        if self.budget not in ("auto", "images", "seconds"):
            raise ValueError(f"budget must be images, seconds or auto, got {self.budget!r}")
        if self.is_timed and self.lr_schedule != "constant":
            raise ValueError(
                "lr_schedule must be constant for a budget in seconds, whose runs go on from those "
                f"of equal images, got {self.lr_schedule}"
            )
        if self.steps < 4:  # a run of half the budget saves a checkpoint after half of its steps
            raise ValueError(f"steps must be at least 4, got {self.steps}")
        for name in ("seeds", "workers", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_held_out < 2:
            raise ValueError(f"num_held_out must be at least 2, got {self.num_held_out}")
        if self.num_samples < 0 or 0 < self.num_samples < GRID_IMAGES:
            raise ValueError(
                f"num_samples must be 0 or at least {GRID_IMAGES}, got {self.num_samples}"
            )

    @property
    def is_timed(self) -> bool:
        """Whether variants are compared after equal seconds too."""
        return self.budget == "seconds" or (self.budget == "auto" and self.name == "leaderboard")
