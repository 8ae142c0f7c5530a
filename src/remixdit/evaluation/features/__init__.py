"""Images => features for metrics: the networks that do it, and precomputed references.

extractor = load_extractor("lite0")
features = extractor(images)           # (B, H, W, C) uint8 => pool (B, F), and more
metric_name("FID", extractor.name)     # "FID-lite0": only FID's own Inception makes it a "FID"
"""

from remixdit.evaluation.features.extractors import Extractor, Features, load_extractor, metric_name
from remixdit.evaluation.features.references import Reference, read_reference, write_statistics

__all__ = [
    "Extractor",
    "Features",
    "Reference",
    "load_extractor",
    "metric_name",
    "read_reference",
    "write_statistics",
]
