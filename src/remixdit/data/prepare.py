"""Data as the user names them => shards, encoded once and kept."""

import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from remixdit.data.encoding import EncodeConfig, encode
from remixdit.data.shards import ShardDataset, is_shard_dir
from remixdit.images.opening import open_source
from remixdit.images.source import UnreadableImageError
from remixdit.progress import Progress

__all__ = ["prepare"]


def prepare(
    source: str | Path,
    cache_dir: str | Path,
    config: EncodeConfig,
    *,
    split: str | None = None,
) -> Generator[Progress, None, ShardDataset]:
    """Open the shards of a source, encoding it into the cache when that has not been done.

    Args:
        source: A directory of shards, which is opened as it is, or what `open_source` takes.
        cache_dir: Holds the shards of this one source and configuration.
        config: How to encode it.
        split: Which part of the source.

    Yields:
        The progress of the encoding.

    Raises:
        ValueError: The source cannot be read, or the cache belongs to another source or size; when
            strict, an UnreadableImageError that names the image, and nothing is left of a new
            cache.
    """
    if is_shard_dir(Path(source)):
        return _whole(source)
    with _left_as_found(Path(cache_dir)):
        yield from encode(open_source(source, split), cache_dir, config)
    return _whole(cache_dir)


def _whole(directory: str | Path) -> ShardDataset:
    dataset = ShardDataset(directory)
    dataset.check_files()  # now, not when the first row of a missing shard is wanted
    return dataset


@contextmanager
def _left_as_found(directory: Path) -> Iterator[None]:
    """Remove the remains of a refused encoding from a directory that is new."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        yield
    except ValueError as error:
        if made and isinstance(error, UnreadableImageError):
            shutil.rmtree(directory, ignore_errors=True)
        for path in made:
            with suppress(OSError):  # there is something in it after all
                path.rmdir()
        raise
