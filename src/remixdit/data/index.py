"""What index.json of a directory of shards says, checked once when it is read.

It may come from anywhere. What reads shards takes sizes, types and file names from it, so nothing
of it is used before its type and bounds are known.
"""

import json
import math
import re
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from remixdit.images.source import regular_file_bytes

__all__ = ["INDEX_FILE", "ShardIndex", "parse_index", "read_index", "shard_file"]

INDEX_FILE = "index.json"
FORMAT_VERSION = 1
DTYPES = {"pixels": "uint8", "moments": "float16"}  # by kind
MAX_SIDE = 2**16  # of an image or a latent, and its most channels
MAX_IMAGES = 2**40
HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
TYPE_NAMES = {int: "an integer", float: "a finite number", str: "a text", bool: "true or false"}


def shard_file(number: int, *, mirrored: bool = False) -> str:
    """Return the name of a shard's file."""
    return f"{'mirrored' if mirrored else 'latents'}-{number:05d}.npy"


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """The images that were encoded."""

    name: str
    num_images: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class ShardFacts:
    """One shard."""

    num_images: int
    digests: dict[str, str]

    def check(self, number: int, shard_size: int, mirrored: bool) -> None:
        """Refuse other files than its own: a name could lead anywhere."""
        _check_range(f"shards[{number}].num_images", self.num_images, 0, shard_size)
        names = [shard_file(number, mirrored=side) for side in ((False, True)[: 1 + mirrored])]
        if sorted(self.digests) != sorted(names):
            raise ValueError(
                f"shards[{number}].digests must be of {', '.join(names)}, "
                f"got {_short(sorted(self.digests))}"
            )


@dataclass(frozen=True, kw_only=True)
class SkippedImage:
    """An image that could not be read."""

    index: int
    image: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The content of index.json."""

    format_version: int
    kind: str
    source: SourceFacts
    autoencoder: dict[str, Any]
    image_size: int
    channels: int
    crop: str
    mirrored: bool
    latent_shape: list[int]
    shape: list[int]
    dtype: str
    shard_size: int
    class_names: list[str]
    precision: str = "fp32"
    batch_size: int = 1
    num_images: int
    num_classes: int
    class_counts: list[int]
    class_labels_digest: str
    shards: list[ShardFacts]
    skipped: list[SkippedImage]

    def __post_init__(self) -> None:
        _check_one_of("kind", self.kind, tuple(DTYPES))
        _check_one_of("dtype", self.dtype, (DTYPES[self.kind],))
        _check_one_of("channels", self.channels, (1, 3))
        _check_range("image_size", self.image_size, 1, MAX_SIDE)
        self._check_shapes()
        _check_autoencoder(self.autoencoder, self.latent_shape[0])
        self._check_counts()

    def _check_shapes(self) -> None:
        for name in ("latent_shape", "shape"):
            value = getattr(self, name)
            if len(value) != 3:
                raise ValueError(f"{name} must be three integers, got {_short(value)}")
            for size in value:
                _check_range(name, size, 1, MAX_SIDE)
        channels, *sides = self.latent_shape
        expected = [2 * channels if self.kind == "moments" else channels, *sides]
        if self.shape != expected:
            raise ValueError(f"shape must be {expected} for its latents, got {self.shape}")

    def _check_counts(self) -> None:
        _check_range("num_images", self.num_images, 1, MAX_IMAGES)
        _check_range("shard_size", self.shard_size, 1, MAX_IMAGES)
        for number, shard in enumerate(self.shards):
            shard.check(number, self.shard_size, self.mirrored)
        stored = sum(shard.num_images for shard in self.shards)
        _check_one_of("num_images", self.num_images, (stored,))
        _check_one_of("num_classes", self.num_classes, (len(self.class_names),))
        _check_one_of("class_counts", len(self.class_counts), (self.num_classes,))


def read_index(directory: Path) -> bytes:
    """Return the bytes of index.json.

    Raises:
        ValueError: There is none.
    """
    path = directory / INDEX_FILE
    try:
        return regular_file_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{directory} holds no {INDEX_FILE}: it is no finished encoding") from None
    except ValueError as error:
        raise ValueError(f"{path} is no index of shards: {error}") from error


def parse_index(directory: Path, content: bytes) -> dict[str, Any]:
    """Return the content of index.json, of which all fields are there and make sense.

    Raises:
        ValueError: A field is missing, unknown, of another type or out of bounds.
    """
    path = directory / INDEX_FILE
    try:
        index: dict[str, Any] = json.loads(content)
        version = index["format_version"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no index of shards: {error!r:.200}") from error
    if version != FORMAT_VERSION:
        shown = _short(version)
        raise ValueError(f"format_version of {directory} must be {FORMAT_VERSION}, got {shown}")
    try:
        _parsed(ShardIndex, index, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return index


def _parsed(kind: Any, value: Any, where: str) -> Any:
    """Return JSON as a dataclass, list, dictionary or plain value of the type wanted."""
    if is_dataclass(kind):
        return _parsed_fields(kind, value, where)
    container, inner = get_origin(kind), get_args(kind)
    if container is list and isinstance(value, list):
        return [_parsed(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if container is dict and isinstance(value, dict):
        return {name: _parsed(inner[1], item, f"{where}.{name}") for name, item in value.items()}
    if kind is Any or _is_plain(kind, value):
        return value
    wanted = TYPE_NAMES.get(kind) or f"a {container.__name__}"
    raise ValueError(f"{_short(where)} must be {wanted}, got {_short(value)}")


def _parsed_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {_short(value)}")
    known = {field.name: field for field in fields(kind)}
    prefix = f"{where}." if where else ""
    for name in [name for name in value if name not in known]:
        raise ValueError(f"{_short(prefix + name)} is unknown")
    for name, field in known.items():
        if name not in value and field.default is MISSING:
            raise ValueError(f"{prefix}{name} is missing")
    hints = get_type_hints(kind)
    return kind(**{name: _parsed(hints[name], value[name], prefix + name) for name in value})


def _is_plain(kind: Any, value: Any) -> bool:
    if kind is float:
        return _is_finite(value)
    if kind in (int, str, bool):
        return type(value) is kind  # true is an int to Python
    return False


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


def _check_autoencoder(spec: dict[str, Any], num_channels: int) -> None:
    name = spec.get("name")
    if not isinstance(name, str) or not (Path(name).is_absolute() or HUB_ID.fullmatch(name)):
        raise ValueError(f"autoencoder.name must be none, a path or owner/name, got {_short(name)}")
    for key in ("scaling_factor", "shift_factor"):
        value = spec.get(key, 1.0)
        if not _is_finite(value) or (key == "scaling_factor" and value == 0):
            raise ValueError(f"autoencoder.{key} must be a finite number, got {_short(value)}")
    for key in {"latents_std", "latents_mean"} if spec.keys() & {"latents_std"} else ():
        values = spec.get(key)
        if (
            not isinstance(values, list)
            or len(values) != num_channels
            or not all(_is_finite(value) and (value or key == "latents_mean") for value in values)
        ):
            raise ValueError(
                f"autoencoder.{key} must be {num_channels} finite numbers, got {_short(values)}"
            )


def _check_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        wanted = " or ".join(map(str, allowed))
        raise ValueError(f"{name} must be {wanted}, got {_short(value)}")


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} must lie in [{least}, {most}], got {_short(value)}")


def _short(value: object) -> str:
    return f"{value!r:.80}"
