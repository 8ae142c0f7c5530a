"""What training calls: whatever the user named => shards, encoded once and kept."""

from collections.abc import Callable
from pathlib import Path

from remixdit.data.encoding import EncodeConfig, Progress, encode
from remixdit.data.shards import ShardDataset, is_shard_dir
from remixdit.data.sources import open_source

__all__ = ["prepare"]


def prepare(
    source: str | Path,
    cache_dir: str | Path,
    config: EncodeConfig,
    *,
    split: str | None = None,
    report: Callable[[Progress], None] | None = None,
) -> ShardDataset:
    """Open the shards of a source, encoding it into the cache when that has not been done.

    Args:
        source: a directory of shards, which is opened as it is, or what `open_source` takes.
        cache_dir: holds the shards of this one source and configuration.
        config: how to encode it.
        split: which part of the source.
        report: is called with the progress of the encoding.

    Raises:
        ValueError: the source cannot be read, or the cache belongs to another source or size.
    """
    if is_shard_dir(Path(source)):
        return ShardDataset(source)
    for progress in encode(open_source(source, split), cache_dir, config):
        if report is not None:
            report(progress)
    return ShardDataset(cache_dir)
