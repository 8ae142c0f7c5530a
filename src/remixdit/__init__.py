"""Train one diffusion transformer; get N timestep experts for the price of one."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remixdit.diffusion.dit import DiT, DiTConfig
    from remixdit.diffusion.intervals import Intervals
    from remixdit.mixture.experts import Experts
    from remixdit.mixture.remix import remix
    from remixdit.model.config import RemixConfig
    from remixdit.model.model import RemixDiT

__all__ = ["DiT", "DiTConfig", "Experts", "Intervals", "RemixConfig", "RemixDiT", "remix"]
__version__ = "0.2.0.dev0"

_MODULES = {
    "DiT": "diffusion.dit",
    "DiTConfig": "diffusion.dit",
    "Intervals": "diffusion.intervals",
    "Experts": "mixture.experts",
    "RemixConfig": "model.config",
    "RemixDiT": "model.model",
    "remix": "mixture.remix",
}


def __getattr__(name: str) -> object:
    # Torch takes seconds to import; `remixdit --help` must not wait for it.
    if name not in _MODULES:
        raise AttributeError(f"module 'remixdit' has no attribute {name!r}")
    return getattr(import_module(f"remixdit.{_MODULES[name]}"), name)
