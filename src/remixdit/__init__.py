"""Train one diffusion transformer; get N timestep experts for the price of one."""

from remixdit.dit import DiT, DiTConfig
from remixdit.intervals import Intervals
from remixdit.mixing import Mixture
from remixdit.model import RemixConfig, RemixDiT

__all__ = ["DiT", "DiTConfig", "Intervals", "Mixture", "RemixConfig", "RemixDiT"]
__version__ = "0.1.0"
