"""Weights from elsewhere in, and plain networks out.

files      reading and writing: a foreign file never runs code, an output is whole or not there
layout     the published names and shapes of DiT and Remix-DiT
importing  a published checkpoint => RemixDiT
sit        the weights of a SiT => those of a DiT of flow matching
directories  what diffusers saved => RemixDiT
exporting  RemixDiT => plain DiTs, under the published names or diffusers'
lora       low-rank RemixDiT => LoRA files for diffusers' DiT
pipelines  RemixDiT => a pipeline of diffusers, with the code of remix_dit_pipeline
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
from remixdit.interchange.lora import export_lora
from remixdit.interchange.pipelines import export_pipeline

__all__ = [
    "ExportConfig",
    "ImportConfig",
    "ImportOptions",
    "export_diffusers",
    "export_dit",
    "export_experts",
    "export_lora",
    "export_pipeline",
    "import_checkpoint",
    "run_export",
    "run_import",
]
