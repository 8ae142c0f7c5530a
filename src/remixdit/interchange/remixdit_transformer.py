"""diffusers' DiT with the timestep embedding that DiTs are trained with.

The embedding of a timestep t is the cosines and sines of t * 10000^(-i / 128), i = 0..127.
diffusers' class divides by 127 instead, and no configuration changes that: at t = 999 the phases
are off by up to 2.9 radians, which no choice of weights undoes. This subclass divides by 128.

    model = RemixExpertTransformer.from_pretrained(directory)

The file stands alone: a copy of it lies beside exported weights, so that they load with nothing
but diffusers.
"""

from typing import Any

from diffusers import DiTTransformer2DModel
from diffusers.loaders import PeftAdapterMixin


class RemixExpertTransformer(DiTTransformer2DModel, PeftAdapterMixin):  # type: ignore[misc]
    """One expert or a plain DiT: diffusers' own class but for timesteps, and it loads LoRAs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as `DiTTransformer2DModel.forward`."""
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0  # the 0 of 128 - 0
        return super().forward(*args, **kwargs)
