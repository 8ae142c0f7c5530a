"""A Remix-DiT as a pipeline of diffusers: K bases, mixed into the expert of each timestep.

    pipe = DiffusionPipeline.from_pretrained(directory, trust_remote_code=True)
    images = pipe(class_labels=["cat", 3], guidance_scale=2.0, num_inference_steps=50).images

The file stands alone: copies of it lie beside exported weights, which then load with nothing but
torch and diffusers.

Shapes: B batch, T tokens, D hidden size, C H W latents, K bases, N experts, L coefficient tables,
S steps, * = the shape of one parameter.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

__all__ = ["RemixDiTModel", "RemixDiTPipeline"]

FREQUENCY_SIZE = 256  # width of the sinusoidal embedding of a timestep


class RemixDiTModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """N experts of one DiT; `forward` runs each image through the expert of its timestep.

    A mixed parameter `weight` is kept as `weight_bases` (K, *), or, with a rank, as `weight_shared`
    (O, I), `weight_down` (K, r, I) and `weight_up` (K, O, r). The expert in use is a buffer.
    """

    _repeated_blocks: ClassVar[list[str]] = ["RemixDiTBlock"]
    _no_split_modules: ClassVar[list[str]] = ["RemixDiTBlock"]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(  # noqa: PLR0913, PLR0917
        self,
        sample_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        num_classes: int,
        learn_sigma: bool,
        boundaries: list[float],
        mixed: dict[str, int],
        table_shape: list[int],
        rank: int = 0,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
    ) -> None:
        """Build the network.

        Args:
            sample_size: Height and width of the latents.
            patch_size: Height and width of a patch.
            in_channels: Channels of the latents, C.
            hidden_size: Width of a token, D.
            depth: Number of blocks.
            num_heads: Number of attention heads.
            mlp_ratio: Width of the MLP's hidden layer over D.
            num_classes: Number of classes, 0 for none; the null label is num_classes.
            learn_sigma: Whether the output has variance channels, which come second.
            boundaries: (N + 1,) expert n owns boundaries[n] <= t < boundaries[n + 1].
            mixed: Names of the mixed parameters, and the coefficient table of each.
            table_shape: (L, N, K).
            rank: Rank of the bases, 0 for whole matrices.
            prediction_type: epsilon, v_prediction or flow_prediction.
            num_train_timesteps: Number of timesteps, T.
        """
        super().__init__()
        out_channels = in_channels * (2 if learn_sigma else 1)
        patches = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)
        self.x_embedder = nn.ModuleDict({"proj": patches})
        self.t_embedder = TimestepEmbedder(hidden_size)
        if num_classes:
            table = nn.Embedding(num_classes + 1, hidden_size)
            self.y_embedder = nn.ModuleDict({"embedding_table": table})
        self.blocks = nn.ModuleList(
            RemixDiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * out_channels)
        positions = sincos_positions(hidden_size, sample_size // patch_size)
        self.register_buffer("pos_embed", positions[None], persistent=False)  # (1, T, D)
        self.coefficients = nn.Parameter(torch.zeros(table_shape), requires_grad=False)
        for name in mixed:
            add_bases(self, name, table_shape[-1], rank)
        self._holds: tuple[Any, ...] | None = None

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict noise or velocity.

        Args:
            hidden_states: (B, C, H, W) noisy latents.
            timestep: (B,) in [0, T); of flow matching 1000 t, in [0, 1000].
            class_labels: (B,) integers in [0, num_classes].
            return_dict: Whether to return a `Transformer2DModelOutput` rather than a tuple.
        """
        experts = self.expert_at(timestep)
        sample: Tensor | None = None
        for expert in torch.unique(experts).tolist():
            self.set_expert(expert)
            rows = (experts == expert).nonzero()[:, 0]
            labels = None if class_labels is None else class_labels[rows]
            output = self._predict(hidden_states[rows], timestep[rows], labels)
            if sample is None:
                sample = output.new_empty(len(hidden_states), *output.shape[1:])
            sample[rows] = output
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def expert_at(self, timestep: Tensor) -> Tensor:
        """Return the expert of each timestep (B,), integers in [0, N)."""
        times = timestep
        if self.config.prediction_type == "flow_prediction":
            times = timestep.float() / 1000
        inner = torch.tensor(self.config.boundaries[1:-1], dtype=torch.float64)
        return torch.searchsorted(inner.to(times.device), times.double().contiguous(), right=True)

    @torch.no_grad()
    def set_expert(self, expert: int) -> None:
        """Mix the weights of an expert in [0, N), unless they are there."""
        bases = [value for name, value in self.named_parameters() if is_of_mixture(name)]
        versions = (
            (value.data_ptr(), 0 if value.is_inference() else value._version) for value in bases
        )
        wanted = (expert, *versions)
        if self._holds == wanted:
            return
        for name, table in self.config.mixed.items():
            owner, leaf = owner_of(self, name)
            row = self.coefficients[table, expert].float()  # (K,)
            setattr(owner, leaf, mixed_parameter(owner, leaf, row))
        self._holds = wanted

    def _predict(self, latents: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        """Run the expert that is set: (B, C, H, W) => (B, out_channels, H, W)."""
        conditioning = self.t_embedder(timesteps)  # (B, D)
        if self.config.num_classes:
            if labels is None:
                raise ValueError(f"class_labels are needed by {self.config.num_classes} classes")
            conditioning = conditioning + self.y_embedder["embedding_table"](labels)
        tokens = self.x_embedder["proj"](latents.to(conditioning.dtype))
        tokens = tokens.flatten(2).transpose(1, 2)  # (B, T, D), row by row
        tokens = tokens + self.pos_embed.to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, conditioning)
        patches = self.final_layer(tokens, conditioning).float()
        side, patch = self.config.sample_size // self.config.patch_size, self.config.patch_size
        patches = patches.reshape(-1, side, side, patch, patch, patches.shape[-1] // patch**2)
        return torch.einsum("bhwpqc->bchpwq", patches).flatten(4, 5).flatten(2, 3)


class RemixDiTBlock(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the conditioning."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """Transform tokens (B, T, D) under conditioning (B, D)."""
        modulation = self.adaLN_modulation(conditioning)[:, None]  # (B, 1, 6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=2)
        tokens = tokens + gate1 * self._attend(self.norm1(tokens) * (1 + scale1) + shift1)
        inside = self.mlp["fc1"](self.norm2(tokens) * (1 + scale2) + shift2)
        return tokens + gate2 * self.mlp["fc2"](F.gelu(inside, approximate="tanh"))

    def _attend(self, tokens: Tensor) -> Tensor:
        """Attend to all tokens: (B, T, D) => (B, T, D)."""
        batch, length, _ = tokens.shape
        qkv = self.attn["qkv"](tokens).view(batch, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, D/heads)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.attn["proj"](attended.transpose(1, 2).flatten(2))


class FinalLayer(nn.Module):
    """A modulated norm and the linear to pixels of a patch."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """Project: (B, T, D) => (B, T, out_features)."""
        shift, scale = self.adaLN_modulation(conditioning)[:, None].chunk(2, dim=2)
        return self.linear(self.norm_final(tokens) * (1 + scale) + shift)


class TimestepEmbedder(nn.Module):
    """Cosines and sines of the timestep at 10000^(-i / 128), then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first = nn.Linear(FREQUENCY_SIZE, width)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        """Embed: (B,) => (B, D)."""
        half = FREQUENCY_SIZE // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
        # float32: a bfloat16 could not tell timestep 999 from 1000.
        angles = timesteps[:, None].float() * torch.exp(-math.log(10000) * exponents)
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class RemixDiTPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Class labels => images.

    `num_inference_steps` timesteps are spread evenly from T - 1 to 0, whatever the scheduler's
    `timestep_spacing` says: the scheduler is given the process that visits those alone.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: Any,
        vae: AutoencoderKL | None = None,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label)
        self.labels = {name: int(label) for label, name in (id2label or {}).items()}

    @torch.no_grad()
    def __call__(  # noqa: PLR0913, PLR0917
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        batch_size: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Draw images.

        Args:
            class_labels: Labels or names of the classes, one for each image.
            guidance_scale: Scale of classifier-free guidance, at least 1; 1 for none.
            guidance_interval: Part of the way from data (0) to noise (1) where guidance acts.
            num_inference_steps: Number of sampling steps, S.
            generator: Generator of the noise, or one for each image.
            latents: (B, C, H, W) noise to begin with, in place of a generator's.
            batch_size: Number of images of a model without classes.
            output_type: pil, np (B, H, W, C in [0, 1]), pt (B, C, H, W in [0, 1]) or latent.
            return_dict: Whether to return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: Called with (pipeline, step, timestep, {"latents": ...}) after
                each step; what it returns replaces the latents.
            callback_on_step_end_tensor_inputs: Names of the tensors given to it: latents.
        """
        labels = self._label_ids(class_labels, batch_size)
        self._check_guidance(guidance_scale, guidance_interval)
        scheduler, timesteps = self._trajectory(num_inference_steps)
        latents = self._noise(len(labels), generator, latents) * getattr(
            scheduler, "init_noise_sigma", 1.0
        )
        extra = step_options(scheduler, generator)
        with self.progress_bar(total=len(timesteps)) as bar:
            for number, (time, index) in enumerate(
                zip(timesteps, scheduler.timesteps, strict=True)
            ):
                share = time / self._last_time()
                guides = guidance_interval[0] <= share <= guidance_interval[1]
                scale = guidance_scale if guides else 1.0
                output = self._guided(scheduler, latents, (time, index), labels, scale)
                latents = scheduler.step(output, index, latents, **extra, return_dict=False)[0]
                if callback_on_step_end is not None:
                    given = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = callback_on_step_end(self, number, time, given).get(
                        "latents", latents
                    )
                bar.update()
        images = self._images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _label_ids(self, given: Any, batch_size: int) -> list[int]:
        """Return the label of each image; zeros of a model without classes."""
        num_classes = self.transformer.config.num_classes
        if not num_classes:
            if given is not None:
                raise ValueError(f"class_labels must not be given without classes, got {given!r}")
            return [0] * batch_size
        if given is None:
            raise ValueError(f"class_labels must be given for {num_classes} classes, got none")
        labels = []
        for label in [given] if isinstance(given, int | str) else given:
            number = self.labels.get(label) if isinstance(label, str) else int(label)
            if number is None or not 0 <= number < num_classes:
                raise ValueError(
                    f"class_labels must be in [0, {num_classes}) or names of pipe.labels, "
                    f"got {label!r}"
                )
            labels.append(number)
        return labels

    def _check_guidance(self, scale: float, interval: tuple[float, float]) -> None:
        if not 1 <= scale < math.inf or (scale > 1 and not self.transformer.config.num_classes):
            raise ValueError(
                f"guidance_scale must be at least 1, and 1 without classes, got {scale}"
            )
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"guidance_interval must rise within [0, 1], got {interval}")

    def _last_time(self) -> float:
        """Return the timestep of pure noise, of which the guidance interval is a share."""
        is_flow = self.transformer.config.prediction_type == "flow_prediction"
        return 1000 if is_flow else self.transformer.config.num_train_timesteps

    def _noise(self, count: int, generator: Any, given: Tensor | None) -> Tensor:
        """Return the latents to begin with, (B, C, H, W) float32."""
        config = self.transformer.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        if given is None:
            given = randn_tensor(shape, generator, self._execution_device, torch.float32)
        if tuple(given.shape) != shape:
            raise ValueError(f"latents must be {shape}, got {tuple(given.shape)}")
        return given.to(self._execution_device, torch.float32)

    def _trajectory(self, num_steps: int) -> tuple[Any, list[float]]:
        """Return a scheduler of S steps, and the timestep of the network at each.

        diffusers' schedulers step from t to t - T / S. Given the betas between the S timesteps,
        index i of the scheduler stands for timestep i of those, and the steps meet.
        """
        config, old = self.transformer.config, self.scheduler.config
        is_flow = config.prediction_type == "flow_prediction"
        if is_flow != (old.get("prediction_type", "flow_prediction") == "flow_prediction") or (
            not is_flow and old.prediction_type != config.prediction_type
        ):
            raise ValueError(
                f"scheduler must be of {config.prediction_type}, "
                f"got {type(self.scheduler).__name__}"
            )
        if is_flow:
            scheduler = type(self.scheduler).from_config(old)
            if takes(scheduler.set_timesteps, "sigmas"):
                sigmas = torch.linspace(1, 0, num_steps + 1)[:-1].tolist()
                scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device)
            else:
                scheduler.set_timesteps(num_steps, device=self._execution_device)
            return scheduler, scheduler.timesteps.tolist()
        if not 1 <= num_steps <= config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps must be in 1..{config.num_train_timesteps}, got {num_steps}"
            )
        spaced, betas = respaced(config.num_train_timesteps, num_steps)
        changes = {"num_train_timesteps": num_steps, "trained_betas": betas.tolist()}
        changes |= {"timestep_spacing": "trailing", "steps_offset": 0}
        known = {name: value for name, value in changes.items() if name in old}
        if "trained_betas" not in known:
            raise ValueError(
                f"scheduler must take trained_betas, got {type(self.scheduler).__name__}"
            )
        scheduler = type(self.scheduler).from_config(old, **known)
        scheduler.set_timesteps(num_steps, device=self._execution_device)
        indices = scheduler.timesteps.cpu().double().numpy()  # whole ones, or halves of Heun's kin
        return scheduler, np.interp(indices, np.arange(num_steps), spaced).tolist()

    def _guided(
        self,
        scheduler: Any,
        latents: Tensor,
        when: tuple[float, Any],
        labels: list[int],
        scale: float,
    ) -> Tensor:
        """Return null + scale * (conditional - null), as the scheduler takes it."""
        time, index = when
        inputs = latents
        if hasattr(scheduler, "scale_model_input"):
            inputs = scheduler.scale_model_input(latents, index)
        null = [self.transformer.config.num_classes] * len(labels)
        both = torch.tensor(labels if scale == 1 else labels + null, device=latents.device)
        inputs = inputs if scale == 1 else torch.cat([inputs, inputs])
        times = torch.full((len(both),), time, device=latents.device)
        output = self.transformer(inputs, times, both, return_dict=False)[0]
        channels = latents.shape[1]
        if scale > 1:
            output, null_output = output.chunk(2)
            guided = torch.lerp(null_output[:, :channels], output[:, :channels], scale)
            output = torch.cat([guided, output[:, channels:]], dim=1)
        learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
        return output if learned else output[:, :channels]

    def _images(self, latents: Tensor, output_type: str) -> Any:
        """Return finished latents (B, C, H, W) in the form that is asked for."""
        if output_type == "latent":
            return latents
        pixels = latents
        if self.vae is not None:
            pixels = self.vae.decode(unscaled(latents, self.vae.config).to(self.vae.dtype)).sample
        if output_type == "pt":
            return (pixels.float() / 2 + 0.5).clamp(0, 1)
        rows = pixels.float().permute(0, 2, 3, 1).cpu()
        if output_type == "np":
            return (rows / 2 + 0.5).clamp(0, 1).numpy()
        if output_type != "pil":
            raise ValueError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        arrays = ((rows + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
        return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]


def step_options(scheduler: Any, generator: Any) -> dict[str, Any]:
    """Return the options of a step: DDIM recomputes epsilon from an image that it clips."""
    options = {"generator": generator} if takes(scheduler.step, "generator") else {}
    clips = scheduler.config.get("clip_sample") or scheduler.config.get("thresholding")
    if clips and takes(scheduler.step, "use_clipped_model_output"):
        options["use_clipped_model_output"] = True
    return options


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of that name."""
    return name in inspect.signature(function).parameters


def respaced(num_train_timesteps: int, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (S,) rising timesteps, and (S,) betas of the process that visits those alone."""
    scale, last = 1000 / num_train_timesteps, num_train_timesteps - 1
    signal = np.cumprod(1 - np.linspace(scale * 1e-4, scale * 0.02, num_train_timesteps))
    spaced = np.linspace(0, last, num_steps).round() if num_steps > 1 else np.array([last])
    kept = signal[spaced.astype(np.int64)]
    return spaced, 1 - kept / np.concatenate([[1.0], kept[:-1]])


def unscaled(latents: Tensor, config: Any) -> Tensor:
    """Undo the scale and shift of an autoencoder's latents (B, C, H, W)."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0)
    columns = [torch.tensor(values, device=latents.device).view(-1, 1, 1) for values in (std, mean)]
    return latents / (config["scaling_factor"] / columns[0]) + columns[1]


def owner_of(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a parameter, and its name there."""
    owner, _, leaf = name.rpartition(".")
    return network.get_submodule(owner), leaf


def is_of_mixture(name: str) -> bool:
    """Whether a parameter is one that experts are mixed from."""
    return name == "coefficients" or name.endswith(("_bases", "_shared", "_down", "_up"))


def add_bases(network: nn.Module, name: str, num_bases: int, rank: int) -> None:
    """Keep K bases of a parameter, and the expert's own value as a buffer, which is not saved."""
    owner, leaf = owner_of(network, name)
    shape = owner.get_parameter(leaf).shape
    delattr(owner, leaf)
    parts = {"bases": (num_bases, *shape)}
    if rank:
        down, up = (num_bases, rank, shape[1]), (num_bases, shape[0], rank)
        parts = {"shared": tuple(shape), "down": down, "up": up}
    for part, size in parts.items():
        owner.register_parameter(f"{leaf}_{part}", nn.Parameter(torch.zeros(size)))
    owner.register_buffer(leaf, torch.zeros(shape), persistent=False)


def mixed_parameter(owner: nn.Module, leaf: str, row: Tensor) -> Tensor:
    """Return a parameter (*) of the expert with the coefficients `row`, (K,)."""
    if hasattr(owner, f"{leaf}_bases"):
        bases = owner.get_parameter(f"{leaf}_bases")
        return torch.tensordot(row, bases.float(), 1).to(bases.dtype)
    shared, down, up = (owner.get_parameter(f"{leaf}_{part}") for part in ("shared", "down", "up"))
    scaled = (row[:, None, None] * up.float()).transpose(0, 1).flatten(1)  # (O, K r)
    return (shared.float() + scaled @ down.float().flatten(0, 1)).to(shared.dtype)


def sincos_positions(width: int, side: int) -> Tensor:
    """Return the fixed embedding of a `side` x `side` grid: (T, D) float32, row by row."""
    quarter = width // 4
    # On the CPU also where weights are made on the meta device.
    steps = torch.arange(max(quarter, side), dtype=torch.float64, device="cpu")
    angles = steps[:side, None] * 10000.0 ** -(steps[:quarter] / quarter)  # (side, D/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)  # (T, D/2)
    return torch.cat([columns, rows], dim=1).float()
