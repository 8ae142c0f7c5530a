"""Embedded colour profiles (ICC): what the numbers of a picture mean => the sRGB that all else is.

By LittleCMS, through Pillow: relative colorimetric with black point compensation, the default of
photographers' programs. What it rounds is the one thing here that may differ between machines.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

__all__ = ["in_srgb"]

COLOUR_SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}  # mode => as a profile names it
MAX_ROUNDING = 2  # of 255: how far the many profiles that mean sRGB are from each other


def in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return a picture with its colours converted from a profile to sRGB, transparency kept.

    The very same picture comes back where there is no profile or that of sRGB, and where the
    profile is broken or of another kind of picture: its numbers are then taken for sRGB.

    Args:
        image: An image of any mode except 16 bits and floating point.
        profile: ICC, as the file holds it.
    """
    mode = (
        "CMYK" if image.mode == "CMYK" else "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    )
    transform = _transform(profile, mode) if profile else None
    if transform is None:
        return image
    transparent = image.convert("RGBA") if image.has_transparency_data else None
    converted = _applied(transform, image if transparent is None else transparent, mode)
    if transparent is not None:
        converted.putalpha(transparent.getchannel("A"))
    return converted


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image, mode: str) -> Image.Image:
    converted = transform.apply(image.convert(mode))
    return converted.getchannel("G") if mode == "L" else converted  # grey stays without colour


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return what converts pictures of a profile, None for those that stay as they are."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != COLOUR_SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ImageCms.PyCMSError):
        return None
    return None if _changes_nothing(transform, mode) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether a transform moves no colour by more than rounding.

    A name would not tell: profiles of sRGB have many, and linear ones are called sRGB too.
    """
    if mode == "CMYK":
        return False
    levels = np.arange(0, 256, 15, dtype=np.uint8)  # 0, 15, ..., 255
    lattice = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    colours = Image.fromarray(lattice)
    if mode == "L":
        colours = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    before = np.asarray(colours.convert("RGB"), np.int64)
    after = np.asarray(_applied(transform, colours, mode).convert("RGB"), np.int64)
    return bool(np.abs(after - before).max() <= MAX_ROUNDING)
