"""From images to shuffled batches of latents.

source = open_source("photos")                          # a folder, parquet, npz, tar, a name
finish(encode(source, "shards", EncodeConfig(image_size=32)))
loader = Loader(ShardDataset("shards"), batch_size=64)
for batch in loader.batches(first_step=0): ...          # batch.latents (B, C, H, W)
"""

from remixdit.data.check import Report, check
from remixdit.data.encoding import EncodeConfig, encode
from remixdit.data.loader import Batch, Loader, check_batch_size
from remixdit.data.prepare import prepare
from remixdit.data.shards import ShardDataset, is_shard_dir
from remixdit.images.opening import check_apart, open_source
from remixdit.images.source import Source, UnreadableImageError

__all__ = [
    "Batch",
    "EncodeConfig",
    "Loader",
    "Report",
    "ShardDataset",
    "Source",
    "UnreadableImageError",
    "check",
    "check_apart",
    "check_batch_size",
    "encode",
    "is_shard_dir",
    "open_source",
    "prepare",
]
