"""Weights from elsewhere in, and plain networks out.

files      reading and writing: a foreign file never runs code, an output is whole or not there
layout     the published names and shapes of DiT and Remix-DiT
importing  a published checkpoint => RemixDiT
sit        the weights of a SiT => those of a DiT of flow matching
directories  what diffusers saved => RemixDiT
exporting  RemixDiT => plain DiTs, under the published names or diffusers'
"""

from remixdit.interchange.exporting import (
    ExportConfig,
    export_diffusers,
    export_dit,
    export_experts,
    run_export,
)
from remixdit.interchange.importing import (
    ImportConfig,
    ImportOptions,
    import_checkpoint,
    run_import,
)

__all__ = [
    "ExportConfig",
    "ImportConfig",
    "ImportOptions",
    "export_diffusers",
    "export_dit",
    "export_experts",
    "import_checkpoint",
    "run_export",
    "run_import",
]
