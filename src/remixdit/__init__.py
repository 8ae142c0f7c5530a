"""Train one diffusion transformer; get N timestep experts for the price of one."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remixdit.dit import DiT, DiTConfig
    from remixdit.intervals import Intervals
    from remixdit.mixing import Mixture
    from remixdit.model import RemixConfig, RemixDiT

__all__ = ["DiT", "DiTConfig", "Intervals", "Mixture", "RemixConfig", "RemixDiT"]
__version__ = "0.1.0"

_MODULES = {
    "DiT": "dit",
    "DiTConfig": "dit",
    "Intervals": "intervals",
    "Mixture": "mixing",
    "RemixConfig": "model",
    "RemixDiT": "model",
}


def __getattr__(name: str) -> object:
    # Torch takes seconds to import; `remixdit --help` must not wait for it.
    if name not in _MODULES:
        raise AttributeError(f"module 'remixdit' has no attribute {name!r}")
    return getattr(import_module(f"remixdit.{_MODULES[name]}"), name)
