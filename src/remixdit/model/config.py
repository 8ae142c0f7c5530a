"""The configuration of a Remix-DiT, without its weights: `config.json`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from remixdit.diffusion.dit import DiTConfig
from remixdit.diffusion.intervals import Intervals
from remixdit.diffusion.noise import Diffusion, Flow, linear_betas
from remixdit.mixture.coefficients import KINDS, check_counts
from remixdit.model.validation import check_fields, fits, json_object, shown, wanted

__all__ = ["LARGEST", "RemixConfig", "noise_process", "read_config"]

FORMAT_VERSION = 1
PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction")
# Fields whose defaults would silently make another model of the same weights.
REQUIRED = {
    *("network", "num_bases", "num_experts", "mixed", "coefficients", "boundaries"),
    *("prediction_type", "num_train_timesteps"),
}
# Fields of a network that earlier versions did not write; their defaults are what these computed.
LATER = {"timestep_embedding"}
# What nobody trains; it keeps a forged file from taking the memory or hours.
LARGEST = {
    **{"input_size": 2**14, "patch_size": 2**14, "in_channels": 2**14, "hidden_size": 2**16},
    **{"depth": 512, "num_heads": 2**12, "mlp_ratio": 256, "num_classes": 10**7},
    **{"num_bases": 2**12, "num_experts": 2**14, "num_train_timesteps": 10**6, "rank": 2**16},
}
MOST_NUMBERS = 2**25  # of one table that is computed, not read
MOST_PATTERNS = 100


@dataclass(frozen=True, kw_only=True)
class RemixConfig:
    """Configuration of a Remix-DiT, without its weights; `config.json`."""

    network: DiTConfig = field(default_factory=DiTConfig)
    """Shape of the network."""
    num_bases: int = 4
    """Number of bases, K; in 1..N."""
    num_experts: int = 20
    """Number of experts, N; at least 1."""
    mixed: str | tuple[str, ...] = "attention+mlp"
    """Parameters to mix: attention+mlp, all, or patterns of names separated by commas."""
    coefficients: str = "softmax"
    """Kind of coefficients: softmax, raw or one_hot."""
    per_block: bool = False
    """Whether each block has a coefficient table of its own."""
    rank: int = 0
    """Rank of the bases, which are added to a frozen network; 0 for whole matrices."""
    boundaries: tuple[int, ...] | tuple[float, ...] | None = None
    """(N + 1,) boundaries of the intervals; None for equal widths."""
    prediction_type: str = "epsilon"
    """Prediction of the network: epsilon, v_prediction or flow_prediction."""
    num_train_timesteps: int = 1000
    """Number of timesteps of the linear betas, T; not used by flow matching."""
    class_names: tuple[str, ...] = ()
    """(num_classes,) names, if known."""
    autoencoder: Mapping[str, Any] = field(default_factory=lambda: {"name": "none"})
    """Autoencoder between latents and pixels."""
    license: str = ""
    """License of imported weights."""

    def __post_init__(self) -> None:
        """Refuse fields that do not fit together; fill in the boundaries."""
        check_counts(self.num_bases, self.num_experts)
        if self.rank < 0:
            raise ValueError(f"rank must be at least 0, got {self.rank}")
        if self.coefficients not in KINDS:
            raise ValueError(
                f"coefficients must be one of {', '.join(KINDS)}, got {self.coefficients!r}"
            )
        if self.num_train_timesteps < 1:
            raise ValueError(
                f"num_train_timesteps must be at least 1, got {self.num_train_timesteps}"
            )
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, "
                f"got {self.prediction_type!r}"
            )
        if self.is_flow and self.network.learn_sigma:
            raise ValueError("learn_sigma must be false for flow_prediction, got true")
        if self.class_names and len(self.class_names) != self.network.num_classes:
            raise ValueError(
                f"class_names must be {self.network.num_classes} names, got {len(self.class_names)}"
            )
        self._settle_boundaries()

    def _settle_boundaries(self) -> None:
        if self.boundaries is None:
            object.__setattr__(self, "boundaries", self._uniform().boundaries)
        elif len(self.boundaries) != self.num_experts + 1:
            raise ValueError(
                f"boundaries must be {self.num_experts + 1} numbers for num_experts "
                f"{self.num_experts}, got {len(self.boundaries)}"
            )

    @property
    def is_flow(self) -> bool:
        """Whether time is continuous."""
        return self.prediction_type == "flow_prediction"

    @property
    def is_of_pixels(self) -> bool:
        """Whether latents are pixels; more channels have an autoencoder, even if not stated."""
        return self.autoencoder["name"] == "none" and self.network.in_channels in (1, 3)

    @property
    def draws_images(self) -> bool:
        """Whether the model draws pixels, or says which autoencoder makes pixels of its latents."""
        return self.autoencoder["name"] != "none" or self.is_of_pixels

    def intervals(self) -> Intervals:
        """Return the intervals of timesteps that the experts own."""
        assert self.boundaries is not None
        if self.is_flow:
            return Intervals(tuple(float(value) for value in self.boundaries))
        intervals = Intervals(tuple(int(value) for value in self.boundaries))
        if intervals.boundaries[-1] != self.num_train_timesteps:
            raise ValueError(
                f"boundaries must end at num_train_timesteps {self.num_train_timesteps}, "
                f"got {intervals.boundaries[-1]}"
            )
        return intervals

    def _uniform(self) -> Intervals:
        if self.is_flow:
            return Intervals.continuous(self.num_experts)
        return Intervals.uniform(self.num_experts, self.num_train_timesteps)

    def to_json(self) -> dict[str, Any]:
        """Return the contents of `config.json`."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the configuration for the contents that `to_json` gave."""
        values = dict(values)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}, got {shown(version)}")
        check_fields(cls, values, "config.json", required=REQUIRED, largest=LARGEST)
        network = values["network"]
        every = {item.name for item in fields(DiTConfig)} - LATER
        check_fields(DiTConfig, network, "network", required=every, largest=LARGEST)
        values["network"] = DiTConfig(**network)
        for name in ("boundaries", "class_names", "mixed"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        check_memory(values)
        check_autoencoder(values.get("autoencoder", {"name": "none"}))
        config = cls(**values)
        config.intervals()  # refuses boundaries that are not in order
        return config


def read_config(directory: Path) -> RemixConfig:
    """Return the configuration in a model directory or a checkpoint."""
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"model directory must hold a config.json, got {directory}")
    return RemixConfig.from_json(json_object(path))


def check_memory(values: Mapping[str, Any]) -> None:
    """Refuse a model whose tables alone, which are no weights in a file, fill the memory."""
    network = values["network"]
    if isinstance(values["mixed"], tuple) and len(values["mixed"]) > MOST_PATTERNS:
        raise ValueError(f"mixed must be at most {MOST_PATTERNS} patterns")
    sizes = {
        "input_size": network.num_tokens * network.hidden_size,
        "num_experts": values["num_experts"] * values["num_bases"] * (network.depth + 2),
    }
    for name, size in sizes.items():
        if size > MOST_NUMBERS:
            found = values.get(name, getattr(network, name, None))
            raise ValueError(
                f"{name} must need a table of at most {MOST_NUMBERS:,} numbers, got {found}"
            )


def check_autoencoder(spec: Mapping[str, Any]) -> None:
    """Refuse an autoencoder without a name, and what is no number where numbers are used."""
    for name, value in spec.items():
        kind: Any = str if name in ("name", "digest") else float | tuple[float, ...]
        if not fits(kind, value):
            raise ValueError(
                f"{shown(name)} of autoencoder must be {wanted(kind)}, got {shown(value)}"
            )
    if "name" not in spec:
        raise ValueError("autoencoder must state its name, got none")


def noise_process(config: RemixConfig) -> Diffusion | Flow:
    """Return the noise process with which a model is trained."""
    if config.is_flow:
        return Flow()
    betas = linear_betas(config.num_train_timesteps)
    return Diffusion(config.prediction_type, config.network.learn_sigma, betas)
