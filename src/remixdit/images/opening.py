"""Opening a collection of images by path or name."""

from pathlib import Path

from remixdit.images.archives import mnist5k_source, npz_source, tar_source
from remixdit.images.folders import folder_source
from remixdit.images.hub import is_hub_name
from remixdit.images.source import Source
from remixdit.images.tables import hub_source, parquet_source

__all__ = ["check_apart", "open_source"]

SHARDS = {".parquet": parquet_source, ".tar": tar_source}


def open_source(path_or_name: str | Path, split: str | None = None) -> Source:
    """Open a collection of images.

    Args:
        path_or_name: A folder of class folders, a Parquet file or a folder of them, an npz, a
            WebDataset tar or a folder of them, "mnist5k", or a data set on the Hugging Face hub
            as "owner/name".
        split: Name of the split, e.g. "train", where there are several.

    Raises:
        ValueError: There is no such thing, it holds no images, or its labels make no sense.
    """
    if str(path_or_name) == "mnist5k":
        _check_no_split("mnist5k", split)
        return mnist5k_source()
    path = Path(path_or_name)
    try:
        if path.is_dir():
            return _open_folder(path, split)
        if path.exists():
            return _open_file(path, split)
    except OSError as error:
        raise ValueError(f"{error.filename or path}: {error.strerror or error}") from error
    if not is_hub_name(path_or_name):  # a mistyped path must not wait for the network
        raise ValueError(f"{path_or_name}: no such file or folder, nor owner/name on the hub")
    return hub_source(path.as_posix(), split)


def check_apart(path_or_name: str | Path, output_dir: str | Path, split: str | None = None) -> None:
    """Refuse to write into a folder of images: the output would count as one of its classes."""
    folder, output = Path(path_or_name, split or "").resolve(), Path(output_dir).resolve()
    if folder in output.parents and folder.is_dir() and _shard_suffix(folder) is None:
        raise ValueError(f"output must lie outside of the images in {folder}, got {output_dir}")


def _open_folder(path: Path, split: str | None) -> Source:
    suffix = _shard_suffix(path)
    return folder_source(path, split) if suffix is None else SHARDS[suffix](path, split)


def _shard_suffix(folder: Path) -> str | None:
    """Return what the files end in that hold many images each; None for a folder of images."""
    # They lie at the top or one folder down (data/, train/); deeper is a folder of images.
    for suffix in SHARDS:
        if any(folder.glob(f"*{suffix}")) or any(folder.glob(f"*/*{suffix}")):
            return suffix
    return None


def _open_file(path: Path, split: str | None) -> Source:
    if path.suffix == ".npz":
        _check_no_split(path.name, split)
        return npz_source(path)
    if path.suffix == ".parquet":
        return parquet_source(path, split)
    if path.suffix == ".tar":
        return tar_source(path, split)
    raise ValueError(f"source must be a folder, .parquet, .npz or .tar, got {path}")


def _check_no_split(name: str, split: str | None) -> None:
    if split is not None:
        raise ValueError(f"{name} has no splits, got split {split!r}")
