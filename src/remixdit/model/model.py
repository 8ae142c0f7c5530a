"""A Remix-DiT: network, mixture, intervals and noise process, and its directory on disk.

    config.json         everything but the weights
    model.safetensors   bases.<parameter> (K, *), shared.<parameter> (*), logits (N, K)
    README.md           model card

Shapes: B batch, C H W latents, K bases, N experts, * = the shape of one parameter.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from remixdit.diffusion.dit import DiT
from remixdit.files import write_file
from remixdit.first.mixing import Mixture
from remixdit.model.config import RemixConfig, noise_process

__all__ = ["RemixDiT", "download"]


class RemixDiT(nn.Module):
    """N experts mixed from K bases of one diffusion transformer.

    Args:
        config: What to build.
        network: A network of the configured shape whose weights all bases start with; a new one,
            drawn from `seed`, if not given.
        seed: Of the initial weights.
    """

    def __init__(self, config: RemixConfig, network: DiT | None = None, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.intervals = config.intervals()
        self.process = noise_process(config)
        self.network = DiT(config.network, seed) if network is None else network
        self.mixture = Mixture(
            self.network,
            config.num_bases,
            config.num_experts,
            mixed=config.mixed,
            coefficients=config.coefficients,
            per_block=config.per_block,
        )

    @classmethod
    def from_dit(
        cls, network: DiT, num_bases: int = 4, num_experts: int = 20, **options: Any
    ) -> Self:
        """Remix a plain DiT: K copies of its weights, which mix to the very same network.

        The symmetry between the bases is broken by the logits alone, without a random draw:
        expert n prefers basis floor(n K / N).

        Args:
            network: Is copied.
            num_bases: K.
            num_experts: N.
            options: Other fields of `RemixConfig`, e.g. `coefficients="raw"`.
        """
        config = RemixConfig(
            network=network.config, num_bases=num_bases, num_experts=num_experts, **options
        )
        copied = DiT(network.config)
        copied.load_state_dict(network.state_dict())
        return cls(config, copied)

    @property
    def num_experts(self) -> int:
        """N."""
        return self.config.num_experts

    @property
    def num_bases(self) -> int:
        """K."""
        return self.config.num_bases

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mixture.device

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

    def predict(
        self, expert: int, latents: Tensor, timesteps: Tensor, class_labels: Tensor | None
    ) -> Tensor:
        """Run one expert on a batch that is all its own; shapes as `denoise`, no checks."""
        self.mixture.activate(expert)
        self.network.eval()
        return self.network(latents, self.process.network_timesteps(timesteps), class_labels)

    def expert(self, index: int) -> DiT:
        """Return a plain network with the weights of expert `index` in [0, N), a float32 copy."""
        network = DiT(self.config.network)
        network.load_state_dict(self.mixture.expert_state(index))
        return network.to(self.device)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the model directory; each file is written beside and then renamed."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {
            name: values.detach().cpu().contiguous()
            for name, values in self.mixture.state_dict().items()
        }
        write_file(directory / "model.safetensors", lambda path: save_file(weights, path))
        text = json.dumps(self.config.to_json(), indent=2, ensure_ascii=False) + "\n"
        card = model_card(self.config)
        write_file(directory / "config.json", lambda path: path.write_text(text, "utf-8"))
        write_file(directory / "README.md", lambda path: path.write_text(card, "utf-8"))

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], device: str | torch.device = "cpu"
    ) -> Self:
        """Load a model directory, or a model of the Hugging Face hub ("owner/name").

        Args:
            name_or_path: A local directory is taken first.
            device: Where the weights go.
        """
        directory = Path(name_or_path)
        if not directory.is_dir():
            directory = download(str(name_or_path))
        if not (directory / "config.json").is_file():
            raise ValueError(f"model directory must hold a config.json, got {directory}")
        values = json.loads((directory / "config.json").read_text("utf-8"))
        try:
            config = RemixConfig.from_json(values)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"config.json must describe a remixdit model, got {directory}"
            ) from error
        model = cls(config)
        model.mixture.load_state_dict(load_file(directory / "model.safetensors"))
        return model.to(device).eval()

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Upload the model directory to the Hugging Face hub; return its address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return str(api.upload_folder(repo_id=repo_id, folder_path=directory))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return all weights, under the names that `model.safetensors` has."""
        return self.mixture.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Copy all weights in; refuses missing, extra or misshaped ones."""
        self.mixture.load_state_dict(dict(state_dict))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a model of its own: copied one by one, parameters would lose their storage."""
        copied = type(self)(self.config).to(self.device).train(self.training)
        copied.load_state_dict(self.state_dict())
        memo[id(self)] = copied
        return copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the mixture along when the module moves."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.mixture.apply(fn)
        return self

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


def download(repo_id: str) -> Path:
    """Fetch a model of the hub into its cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repo_id))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"model must be a directory or a model of the hub, got {repo_id!r}"
        ) from error


def model_card(config: RemixConfig) -> str:
    """Return the README.md of a model directory."""
    network = config.network
    license_line = f"license: other\nlicense_name: {config.license}\n" if config.license else ""
    return (
        f"---\nlibrary_name: remixdit\ntags: [diffusion, remix-dit]\n{license_line}---\n\n"
        f"# Remix-DiT, {config.num_bases} bases, {config.num_experts} experts\n\n"
        f"{network.depth} blocks of width {network.hidden_size}, patch {network.patch_size}, "
        f"latents {network.in_channels}x{network.input_size}x{network.input_size}, "
        f"{network.num_classes} classes, {config.prediction_type}.\n\n"
        "```python\nfrom remixdit import RemixDiT\n\n"
        'model = RemixDiT.from_pretrained("this directory")\n'
        "output = model.denoise(latents, timesteps, class_labels)\n```\n"
    )
