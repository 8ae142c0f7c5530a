"""What a training run is asked to do.

Frozen dataclasses; the command line shows the docstring under each field as its help.
"""

import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from remixdit.data.encoding import check_image_size
from remixdit.diffusion.dit import DiTConfig
from remixdit.mixture.coefficients import KINDS, check_counts
from remixdit.training.optimizer import OptimizerConfig

__all__ = [
    "MAY_CHANGE",
    "PRECISIONS",
    "MixtureConfig",
    "ObjectiveConfig",
    "OutputConfig",
    "TrainConfig",
    "seconds_of",
]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

POLICIES = ("auto", "uniform", "log_snr", "loss")
TRACKERS = ("wandb", "trackio")

# Settings that may differ between a run and its resumption; boundaries follow from others.
MAY_CHANGE = {
    *("steps", "device", "save_every", "log_every", "sample_every", "keep_checkpoints"),
    *("output_dir", "tensorboard", "shard", "strict", "shard_size", "recompute", "boundaries"),
    *("compile", "micro_batch_size", "allow_older", "save_minutes", "stop_after"),
    "tracker",
    *("sample_images", "sample_inference_steps"),
}


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Bases, experts, and the choice of experts in a step."""

    num_bases: int = 4
    """Number of bases, K; 1, with num_experts 1, for a plain DiT."""
    num_experts: int = 20
    """Number of experts, N; at least K."""
    experts_per_step: int = 0
    """Number of experts that share every batch, M; 0 for all N, 1 for the published method."""
    mixed: str = "attention+mlp"
    """Parameters to mix: attention+mlp, all, or patterns of names separated by commas."""
    coefficients: str = "softmax"
    """Kind of coefficients: softmax, raw (free) or one_hot (frozen; expert n is one basis)."""
    per_block: bool = False
    """Learn a coefficient table for each block instead of one for all."""
    rank: int = 0
    """Rank of the bases, which are added to the frozen model that --from names; 0 for none."""
    symmetry: float | None = None
    """Preference of an expert for its own basis at the start: 0 for none, 10 for little else; 2 if
    not given, 8 for several networks."""
    intervals: str = "auto"
    """What intervals hold equal parts of: uniform (timesteps), log_snr, loss (the gradient, by the
    loss to expect), or auto, which is loss if every step holds all intervals, else uniform."""
    prior_strength: float = 0.0
    """Weight of the prior, which pulls each expert to its own basis (gamma)."""
    prior_schedule: str = "linear"
    """Schedule of the prior: linear, which falls to exactly 0 at the last step, or constant."""
    basis_noise: float = 0.0
    """Noise added to the bases at the start, relative to the RMS of each parameter."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        check_counts(self.num_bases, self.num_experts)
        if self.coefficients not in KINDS:
            raise ValueError(
                f"coefficients must be one of {', '.join(KINDS)}, got {self.coefficients!r}"
            )
        if self.intervals not in POLICIES:
            raise ValueError(
                f"intervals must be one of {', '.join(POLICIES)}, got {self.intervals!r}"
            )
        if self.prior_schedule not in ("linear", "constant"):
            raise ValueError(
                f"prior_schedule must be linear or constant, got {self.prior_schedule!r}"
            )
        if self.rank < 0:
            raise ValueError(f"rank must be at least 0, got {self.rank}")
        self._check_start()
        self._check_one_hot()
        if self.prior_strength and self.coefficients != "softmax":
            raise ValueError(
                f"prior_strength must be 0 for {self.coefficients} coefficients, "
                f"got {self.prior_strength}"
            )
        if not 0 <= self.experts_per_step <= self.num_experts:
            raise ValueError(
                f"experts_per_step must be in 0..{self.num_experts}, got {self.experts_per_step}"
            )

    def _check_one_hot(self) -> None:
        """Refuse experts that would move in the steps that leave them out."""
        some = 0 < self.experts_per_step < self.num_experts
        if self.coefficients == "one_hot" and some:
            raise ValueError(
                "experts_per_step must be 0, for all, with one_hot coefficients, got "
                f"{self.experts_per_step}: Adam's momentum moves every basis in every step"
            )

    def _check_start(self) -> None:
        """Refuse bases that would stay equal for ever, and strengths below 0."""
        apart = [self.symmetry_of(1), self.basis_noise, self.prior_strength]
        if min(apart) < 0:
            raise ValueError(f"symmetry, basis_noise, prior_strength must be >= 0, got {apart}")
        if self.num_bases > 1 and not any(apart):
            raise ValueError(
                "symmetry must be above 0 without basis_noise or prior_strength, got 0: "
                "equal bases with equal coefficients would stay equal for ever"
            )

    def symmetry_of(self, num_networks: int) -> float:
        """Return the symmetry of the start: copies learn faster if they share much.

        Args:
            num_networks: Number of networks that the bases are made of, 1 for copies.
        """
        if self.symmetry is not None:
            return self.symmetry
        return 2.0 if num_networks == 1 else 8.0

    def prior_at(self, step: int, total_steps: int) -> float:
        """Return the prior's strength at a step in [0, total_steps)."""
        if self.prior_schedule == "constant":
            return self.prior_strength
        return self.prior_strength * (1 - step / max(1, total_steps - 1))


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The target of the network, and the timesteps and labels that it learns from."""

    prediction_type: str = "auto"
    """Prediction: epsilon, v_prediction, flow_prediction; auto for that of --from, else epsilon."""
    label_dropout: float = 0.1
    """Share of the labels that become the null label, which guidance needs."""
    logit_normal: bool = False
    """Draw the times of flow matching logit-normal instead of uniform."""
    timestep_strata: int = 0
    """Number of intervals over which each batch of a plain DiT is spread; 0 or 1 for no strata."""
    interval: str = ""
    """Interval n/N that a plain DiT learns alone, as an independent expert; 0/N is least noisy."""
    mirror: bool = False
    """Mirror half of the images left to right."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout must be in [0, 1], got {self.label_dropout}")
        self.only_interval()
        if self.interval and self.timestep_strata > 1:
            raise ValueError(f"timestep_strata must be 0 with interval, got {self.timestep_strata}")
        if self.timestep_strata < 0:
            raise ValueError(f"timestep_strata must be at least 0, got {self.timestep_strata}")
        if self.logit_normal and self.prediction_type not in ("auto", "flow_prediction"):
            raise ValueError("logit_normal must be false without flow_prediction, got true")

    def only_interval(self) -> tuple[int, int] | None:
        """Return (n, N) of the one interval that is learned, None for all."""
        if not self.interval:
            return None
        number, slash, total = self.interval.partition("/")
        if not (slash and number.isdecimal() and total.isdecimal() and int(number) < int(total)):
            raise ValueError(f"interval must be n/N with n in [0, N), got {self.interval!r}")
        return int(number), int(total)


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run writes, and how often."""

    log_every: int = 100
    """Number of optimizer steps between lines of metrics."""
    save_every: int = 5000
    """Number of optimizer steps between checkpoints; the last step is always saved."""
    save_minutes: float = 10.0
    """Number of minutes after which a checkpoint is written in any case; 0 for no limit."""
    stop_after: str = ""
    """Time after which the run saves and ends with exit code 75, e.g. 3h50m; none by default."""
    keep_checkpoints: int = 3
    """Number of checkpoints that are kept, the newest ones."""
    sample_every: int | None = 0
    """Number of steps between grids of samples; 0 for none, None for start, middle and end."""
    sample_images: int = 16
    """Number of images in a grid."""
    sample_inference_steps: int = 50
    """Number of sampling steps for the images of a grid."""
    tensorboard: bool = True
    """Write curves and images for TensorBoard."""
    tracker: str = ""
    """Tracker that gets curves and images too: wandb or trackio (extras); none by default."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in (
            *("log_every", "save_every", "keep_checkpoints"),
            *("sample_images", "sample_inference_steps"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sample_every is not None and self.sample_every < 0:
            raise ValueError(f"sample_every must be at least 0, got {self.sample_every}")
        if not 0 <= self.save_minutes < math.inf:
            raise ValueError(f"save_minutes must be at least 0, got {self.save_minutes}")
        if self.tracker not in ("", *TRACKERS):
            raise ValueError(f"tracker must be one of {', '.join(TRACKERS)}, got {self.tracker!r}")
        seconds_of(self.stop_after)

    def samples_at(self, step: int, steps: int) -> bool:
        """Whether a grid of samples is due.

        Args:
            step: Number of steps that are done.
            steps: Number of all steps of the run.
        """
        if self.sample_every is None:
            return step in (0, steps // 2, steps)
        return bool(self.sample_every and step) and (step == steps or step % self.sample_every == 0)


def seconds_of(duration: str) -> float:
    """Return the seconds of a duration such as 1d, 3h50m or 90s; 0 for none."""
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", duration)
    seconds = [int(part or 0) for part in found.groups()] if found else [0]
    total = sum(part * unit for part, unit in zip(seconds, (86400, 3600, 60, 1), strict=False))
    if duration and not total:
        raise ValueError(f"stop_after must be a time such as 3h50m, 45m or 90s, got {duration!r}")
    return total


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run."""

    data: str
    """Encoded shards, or images: class folders, Parquet, npz, tar or the name of a data set."""
    output_dir: Path
    """Directory of the run; the same command again resumes it."""
    init_from: str | None = None
    """Model to start from: a plain DiT to remix, or a mixture to train further."""
    further_bases: tuple[str, ...] = ()
    """Plain DiTs that are bases beside that of --from; --from A B C means the same."""
    train: str = "all"
    """Weights to train: all, or coefficients, which leaves the bases of --from as they are."""
    steps: int = 100_000
    """Number of optimizer steps."""
    batch_size: int = 256
    """Number of images in a step, over all processes and experts."""
    micro_batch_size: int = 0
    """Number of images in one forward pass of a process; 0 for all. Fewer images save memory."""
    recompute: bool = False
    """Recompute each block in the backward pass to save the memory of its activations."""
    image_size: int | None = None
    """Edge of unencoded images in pixels; by default the input_size of --from, or the network's."""
    strict: bool = False
    """Refuse data with unreadable images instead of leaving those images out."""
    new_labels: bool = False
    """Learn a new class embedding, for data with other classes than the model to start from."""
    allow_older: bool = False
    """Resume from the newest whole checkpoint if newer ones are damaged; these are set aside."""
    seed: int = 0
    """Seed for weights, data order, timesteps and noise."""
    device: str = "auto"
    """Device: auto, cpu or cuda. auto is the GPU if there is one."""
    precision: str = "fp32"
    """Precision of the arithmetic: fp32 or bf16. Parameters are float32."""
    shard: bool = False
    """Shard parameters, gradients, moments and averages over the processes (FSDP2)."""
    shard_size: int = 0
    """Number of processes that share one copy, e.g. the GPUs of one machine; 0 for all."""
    compile: bool = field(default_factory=torch.cuda.is_available)
    """Compile the network block by block; by default on a GPU only."""
    network: DiTConfig = field(default_factory=DiTConfig)
    """Shape of the network; the data decide input_size, in_channels and num_classes."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        """Refuse values that do not fit together, before anything is read or written."""
        least_of = {"steps": 1, "batch_size": 1, "micro_batch_size": 0, "image_size": 8}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        check_image_size(self.image_size)
        self._check_shard()
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")
        if self.objective.timestep_strata > 1 and self.mixture.num_experts > 1:
            raise ValueError(
                "timestep_strata must be 0 with several experts, whose intervals are the strata, "
                f"got {self.objective.timestep_strata}"
            )
        self._check_rank()
        self._check_given_bases()
        self._check_muon()
        if self.objective.interval and self.mixture.num_experts > 1:
            raise ValueError(
                f"interval must be that of a plain DiT, got {self.mixture.num_experts} experts"
            )
        if self.strata_per_step > self.batch_size:
            raise ValueError(
                f"batch_size must be at least one image for each of {self.strata_per_step} "
                f"intervals a step, got {self.batch_size}"
            )

    def _check_shard(self) -> None:
        """Refuse settings of sharding that do not fit together."""
        if self.shard_size < 0 or (self.shard_size and not self.shard):
            raise ValueError(f"shard_size must be 0 without shard, got {self.shard_size}")

    def _check_muon(self) -> None:
        """Refuse Muon where no process has a whole matrix to train."""
        reasons = {
            "--shard, which leaves no process a whole matrix": self.shard,
            "--rank, whose factors are no such matrices": self.mixture.rank > 0,
            "--train coefficients, which are no matrices": self.train == "coefficients",
        }
        for reason, holds in reasons.items():
            if holds and self.optimizer.algorithm == "muon":
                raise ValueError(f"algorithm must be adamw with {reason}, got muon")

    def _check_rank(self) -> None:
        """Refuse low-rank bases that have no trained network to be added to."""
        if self.mixture.rank and (self.init_from is None or self.new_labels):
            raise ValueError(
                "rank must be 0 without a trained model to add bases to (--from), whose class "
                f"embedding stays as it is (no --new-labels), got {self.mixture.rank}"
            )

    def _check_given_bases(self) -> None:
        """Refuse given bases that do not fit the mixture, and coefficients that cannot learn."""
        mixture, given = self.mixture, len(self.further_bases) + (self.init_from is not None)
        if self.train not in ("all", "coefficients"):
            raise ValueError(f"train must be all or coefficients, got {self.train!r}")
        learns = mixture.num_bases > 1 and mixture.coefficients != "one_hot"
        if self.train == "coefficients" and not (self.init_from and learns):
            raise ValueError(
                "train must be all without bases that stay as they are (--from), with one basis "
                f"and with one_hot coefficients, got {self.train}"
            )
        if self.train == "coefficients" and self.new_labels:
            raise ValueError(
                "train must be all with --new-labels, which draws a class embedding that has to "
                f"be learned, got {self.train}"
            )
        if not self.further_bases:
            return
        if given != mixture.num_bases:
            raise ValueError(
                f"num_bases must be the number of networks of --from, {given}, "
                f"got {mixture.num_bases}"
            )
        for name in ("rank", "basis_noise"):
            if getattr(mixture, name):
                raise ValueError(
                    f"{name} must be 0 with several networks of --from, "
                    f"got {getattr(mixture, name)}"
                )

    @property
    def strata_per_step(self) -> int:
        """Number of intervals over which every batch is spread, M."""
        if self.mixture.num_experts == 1:
            return max(1, self.objective.timestep_strata)
        return self.mixture.experts_per_step or self.mixture.num_experts

    @property
    def interval_policy(self) -> str:
        """What the intervals have in equal parts: uniform, log_snr or loss.

        A batch spread so that every interval holds as much of the gradient has the least noisy
        sum. Of all predictions this was seen to pay (docs/log.md). With fewer experts in a step
        each is drawn in proportion to its timesteps.
        """
        if self.mixture.intervals != "auto":
            return self.mixture.intervals
        total = max(self.mixture.num_experts, self.objective.timestep_strata)
        together = self.strata_per_step == total > 1
        return "loss" if together else "uniform"

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "output_dir": str(self.output_dir)}
