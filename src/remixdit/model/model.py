"""A Remix-DiT: network, mixture, intervals and noise process, and its directory on disk.

    config.json         everything but the weights
    model.safetensors   bases.<parameter> (K, *), shared.<parameter> (*), logits (N, K)
    README.md           model card

Shapes: B batch, C H W latents, K bases, N experts, * = the shape of one parameter.
"""

import copy
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor, nn

from remixdit.diffusion.dit import DiT
from remixdit.files import save_tensors, write_file
from remixdit.mixture.coefficients import initial_table
from remixdit.mixture.experts import Experts
from remixdit.mixture.remix import remix
from remixdit.model.alike import boundaries_at, plain_networks
from remixdit.model.card import card_files, model_card
from remixdit.model.config import RemixConfig, noise_process, read_config
from remixdit.model.hub import check_name, check_token, download, upload
from remixdit.model.switch import Switch
from remixdit.model.weights import check_same_shapes, read_weights

__all__ = ["RemixDiT", "write_model_files"]


class RemixDiT(nn.Module):
    """N experts mixed from K bases of one diffusion transformer; an ordinary module.

    Its parameters are what is trained. To train it on one process, call it. To train it with DDP or
    FSDP2, wrap `network`, and route each image to its expert by `experts.route`.

    Args:
        config: Configuration of the model.
        network: Network of the configured shape with whose weights all bases start; it is changed.
            By default a new one, drawn from `seed`.
        seed: Seed of the initial weights.
        symmetry: Preference of the experts for their own bases at the start; see `remix`.
    """

    def __init__(
        self,
        config: RemixConfig,
        network: DiT | None = None,
        seed: int = 0,
        symmetry: float = 2.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.intervals = config.intervals()
        self.process = noise_process(config)
        self.network = DiT(config.network, seed) if network is None else network
        remix(
            self.network,
            config.num_bases,
            config.num_experts,
            mixed=config.mixed,
            coefficients=config.coefficients,
            per_block=config.per_block,
            symmetry=symmetry,
            rank=config.rank,
        )
        self._forget()

    _switch: Switch | None
    _sampling: tuple[torch.dtype | None, bool]

    @classmethod
    def from_dit(
        cls, network: DiT, num_bases: int = 4, num_experts: int = 20, **options: Any
    ) -> Self:
        """Remix a plain DiT: K copies of its weights, which mix to the very same network.

        The symmetry between the bases is broken by the logits alone, without a random draw:
        expert n prefers basis floor(n K / N).

        Args:
            network: Plain network, which is copied.
            num_bases: Number of bases, K.
            num_experts: Number of experts, N.
            options: Other fields of `RemixConfig`, e.g. `coefficients="raw"`.
        """
        config = RemixConfig(
            network=network.config, num_bases=num_bases, num_experts=num_experts, **options
        )
        return cls(config, copy.deepcopy(network))

    @classmethod
    def from_experts(
        cls,
        networks: "Sequence[DiT | RemixDiT]",
        boundaries: Sequence[int] | Sequence[float] | None = None,
        *,
        boundary_ratio: float | None = None,
        **options: Any,
    ) -> Self:
        """Put N plain networks together, each the expert of its own interval.

        Args:
            networks: N networks or models of one expert, of equal shape, the least noisy first.
                What models state, such as the prediction type, must be equal too, and is kept.
            boundaries: (N + 1,) boundaries of the intervals; None for equal widths.
            boundary_ratio: Instead of the boundaries of 2 networks, the share of the timesteps
                from which on the second denoises, as diffusers calls it for Wan2.2.
            options: Other fields of `RemixConfig`, e.g. `prediction_type`.
        """
        networks, stated = plain_networks(networks)
        options = {**stated, **options}
        if boundary_ratio is not None:
            if boundaries is not None:
                raise ValueError("boundaries must be left out with boundary_ratio, got both")
            boundaries = boundaries_at(boundary_ratio, len(networks), options)
        config = RemixConfig(
            network=networks[0].config,
            num_bases=len(networks),
            num_experts=len(networks),
            mixed="all",
            coefficients="one_hot",
            boundaries=None if boundaries is None else tuple(boundaries),
            **options,
        )
        model = cls.empty(config)
        states = [network.state_dict() for network in networks]
        weights = {f"bases.{n}": torch.stack([state[n] for state in states]) for n in states[0]}
        table = initial_table(len(networks), len(networks), "one_hot", 0.0)
        model.load_weights({**weights, "logits": table})
        return model

    @classmethod
    def empty(cls, config: RemixConfig) -> Self:
        """Return a model whose weights have shapes but no storage, to load weights into.

        Args:
            config: Configuration of the model.
        """
        with torch.device("meta"):
            network = DiT(config.network)
        return cls(config, network)

    @property
    def experts(self) -> Experts:
        """The table of the experts: routes, coefficients, plain networks."""
        return self.network.experts  # type: ignore[return-value]

    @property
    def num_experts(self) -> int:
        """Number of experts, N."""
        return self.config.num_experts

    @property
    def num_bases(self) -> int:
        """Number of bases, K."""
        return self.config.num_bases

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.experts.logits.device

    def forward(
        self, latents: Tensor, timesteps: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Return the network's raw output, each image from the expert of its timestep.

        Differentiable; all experts in one pass. Shapes as for `denoise`.
        """
        self._check_inputs(latents, timesteps, class_labels)
        experts = self.intervals.expert_at(timesteps).cpu()
        with self.experts.route(experts):
            times = self.process.network_timesteps(timesteps)
            return self.network(latents, times, class_labels)

    @torch.no_grad()
    def denoise(
        self, latents: Tensor, timesteps: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Return the network's raw output, each image from the expert of its timestep.

        No guidance, no gradient, evaluation mode. A batch that spans intervals is split by
        expert, never averaged.

        Args:
            latents: (B, C, H, W) noisy latents.
            timesteps: (B,) integers in [0, T), or floats in [0, 1] for flow matching.
            class_labels: (B,) integers in [0, num_classes], the last is the null label.

        Returns:
            (B, out_channels, H, W); the variance channels come second.
        """
        self._check_inputs(latents, timesteps, class_labels)
        experts = self.intervals.expert_at(timesteps)
        outputs: Tensor | None = None
        for expert in torch.unique(experts).tolist():
            rows = (experts == expert).nonzero()[:, 0]
            labels = None if class_labels is None else class_labels[rows]
            output = self.predict(expert, latents[rows], timesteps[rows], labels)
            if outputs is None:
                outputs = output.new_empty(len(latents), *output.shape[1:])
            outputs[rows] = output
        if outputs is None:
            raise ValueError("latents must hold at least one image, got none")
        return outputs

    @torch.no_grad()
    def predict(
        self, expert: int, latents: Tensor, timesteps: Tensor, class_labels: Tensor | None
    ) -> Tensor:
        """Run one expert on a batch; shapes as for `denoise`, without checks."""
        with self._lock:  # another thread would write another expert
            network = self.switch().write(expert)
            return network(latents, self.process.network_timesteps(timesteps), class_labels)

    def switch(self) -> Switch:
        """Return the plain network that takes one expert after the other, made on first use."""
        if self._switch is None or not self._switch.is_current():
            with torch.device("meta"):
                network = DiT(self.config.network)
            self._switch = Switch(self.experts, network, *self._sampling)
        return self._switch

    def sample_with(self, dtype: torch.dtype | None = None, compile: bool = False) -> None:
        """Choose how `denoise` and `predict` run.

        Args:
            dtype: Type of the weights, None for float32.
            compile: Whether the network is compiled, once for all experts.
        """
        self._sampling, self._switch = (dtype, compile), None

    @property
    def sampling(self) -> tuple[torch.dtype | None, bool]:
        """Type of the weights and whether they are compiled, as `sample_with` takes them."""
        return self._sampling

    def precompute(self) -> None:
        """Mix all experts once and keep them, until a weight changes; the memory of N networks."""
        with self._lock:
            self.switch().precompute()

    def expert(self, index: int) -> DiT:
        """Return a plain network with the weights of expert `index` in [0, N), a float32 copy."""
        return self.experts.plain(index)  # type: ignore[return-value]

    def weights(self) -> dict[str, Tensor]:
        """Return all weights under the names that `model.safetensors` has."""
        state = self.network.state_dict()
        return {name: state[own] for own, name in self.experts.disk_names().items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights by the names of `weights`; a model without storage keeps these tensors.

        Missing, extra or misshaped weights are refused.
        """
        names = self.experts.disk_names()
        own = self.network.state_dict()
        check_same_shapes({name: own[key] for key, name in names.items()}, weights)
        state = {key: weights[name] for key, name in names.items()}
        self.network.load_state_dict(state, assign=self.experts.logits.is_meta)

    def _forget(self) -> None:
        """Start without a plain network beside the mixture."""
        self._switch, self._sampling = None, (None, False)
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy and pickle, without the plain network for sampling."""
        left_out = ("_switch", "_sampling", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state that `__getstate__` gave."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the model directory; each file is written beside its place and then renamed.

        Args:
            directory: Directory of the model; it is made if it does not exist.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {
            name: values.detach().cpu().contiguous() for name, values in self.weights().items()
        }
        write_file(directory / "model.safetensors", lambda path: save_tensors(weights, path))
        write_model_files(directory, self.config)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], device: str | torch.device = "cpu"
    ) -> Self:
        """Load a model directory, or a model of the Hugging Face hub ("owner/name").

        Args:
            name_or_path: Name or path of the model; a local directory is tried first.
            device: Device of the weights.
        """
        directory = Path(name_or_path)
        if not directory.is_dir():
            directory = download(str(name_or_path))
        return cls.from_directory(directory, "model.safetensors", device)

    @classmethod
    def from_directory(cls, directory: Path, weights: str, device: str | torch.device) -> Self:
        """Load a local model.

        Args:
            directory: A model directory or a checkpoint.
            weights: Name of the file of its weights.
            device: Device of the weights.
        """
        model = cls.empty(read_config(directory))
        model.load_weights(read_weights(directory / weights))
        return model.to(device).eval()

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Upload the model directory, with a card, to the Hugging Face hub; return its address.

        Args:
            repo_id: Name of the model, "owner/name".
            private: Whether a new repository is private.
        """
        check_name(repo_id)
        check_token()
        coefficients = self.experts.coefficients().detach().cpu().numpy()
        with TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            files = {name: Path(directory) / name for name in ("config.json", "model.safetensors")}
            return upload(
                repo_id, {**files, **card_files(self.config, coefficients, repo_id)}, private
            )

    def _check_inputs(
        self, latents: Tensor, timesteps: Tensor, class_labels: Tensor | None
    ) -> None:
        network = self.config.network
        shape = (network.in_channels, network.input_size, network.input_size)
        if tuple(latents.shape[1:]) != shape:
            raise ValueError(f"latents must be (B, {shape}), got {tuple(latents.shape)}")
        if timesteps.shape != latents.shape[:1]:
            raise ValueError(f"timesteps must be ({len(latents)},), got {tuple(timesteps.shape)}")
        if class_labels is not None:
            check_labels(class_labels, network.num_classes)


def check_labels(class_labels: Tensor, num_classes: int) -> None:
    """Refuse labels that have no embedding."""
    outside = (class_labels < 0) | (class_labels > num_classes)
    if outside.any():
        raise ValueError(
            f"class_labels must be in [0, {num_classes}], got {class_labels[outside][0].item()}"
        )


def write_model_files(directory: Path, config: RemixConfig) -> None:
    """Write all files of a model directory but the weights."""
    text = json.dumps(config.to_json(), indent=2, ensure_ascii=False) + "\n"
    card = model_card(config)
    write_file(directory / "config.json", lambda path: path.write_text(text, "utf-8"))
    write_file(directory / "README.md", lambda path: path.write_text(card, "utf-8"))
