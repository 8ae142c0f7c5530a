"""Files of any format => pictures as a photographer means them => square uint8 pixels.

Decoding is Pillow's, colour profiles are LittleCMS's; what follows uses integer arithmetic only, so
the same file gives the same pixels on every platform. The crop is that of ADM (arXiv:2105.05233):
halve by box filter while the image is at least twice too large, resize by bicubic, cut the centre
out.

Shapes: C = 1 (grey) or 3 (red, green, blue), S = image_size.
"""

import io
from functools import cache

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from remixdit.images.profiles import in_srgb
from remixdit.images.room import MAX_PIXELS, room

__all__ = ["MIN_SIDE", "center_crop", "decode", "is_grey", "random_crop", "square_pixels"]

MIN_SIDE = 8  # pixels: anything smaller is a tracking dot or an icon, not a picture
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO")
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
ROTATIONS = {  # what a camera's orientation asks for
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(encoded: bytes) -> Image.Image:
    """Return the picture in an image file, upright, in mode "L" or "RGB".

    An embedded colour profile is converted to sRGB, transparency is laid on white, 16-bit grey is
    scaled (Pillow alone would clip it at 255), the camera's rotation is applied, of an animation
    the first frame is taken.

    Raises:
        ValueError: It is no image, is truncated, too large, too small or of floating point.
    """
    if not encoded:
        raise ValueError("the file is empty")
    try:
        with _opened(encoded) as image:
            _check_size(image)
            with room.of(image.width * image.height):
                image.load()
                profile = image.info.get("icc_profile")
                return _in_plain_colours(_upright(image), profile)
    except UnidentifiedImageError:
        # Pillow's own message holds a memory address, and would differ from run to run.
        known = ", ".join(FORMATS)
        raise ValueError(f"the file is of no known image format ({known})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"an image must hold at most {MAX_PIXELS} pixels") from None
    except _RefusedError:
        raise
    # Decoders raise whatever they meet in a damaged file: struct.error, RuntimeError, KeyError, ...
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"the image cannot be decoded: {reason}") from error


def is_grey(encoded: bytes) -> bool:
    """Return whether the file is an image without colour, from its header alone."""
    try:
        with _opened(encoded) as image:
            if image.mode in ("P", "PA"):
                return False
            return image.mode in GREY_MODES
    except Exception:
        return True  # not the place to complain: decode() does


class _RefusedError(ValueError):
    """A picture that is whole, but not one to learn from."""


def _opened(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded), formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    """Return which of the formats this Pillow knows: AVIF is of version 11.3.

    All others stay closed, as they are where the holes are; EPS would even be run by Ghostscript.
    """
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _upright(image: Image.Image) -> Image.Image:
    try:
        rotation = ROTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF: the picture is there, only its rotation is not known
        rotation = None
    return image if rotation is None else image.transpose(rotation)


def square_pixels(image: Image.Image, channels: int) -> np.ndarray:
    """Return a square picture as (C, S, S) uint8."""
    image = image.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(image)  # (S, S) or (S, S, 3)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def center_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Scale the shorter side to `image_size` and cut the centre out, as ADM does."""
    image = _shorter_side_to(image, image_size)
    left = (image.width - image_size) // 2
    top = (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def random_crop(image: Image.Image, image_size: int, generator: np.random.Generator) -> Image.Image:
    """Cut a random square of at least 0.8 of the shorter side, as ADM does."""
    image = _shorter_side_to(image, int(generator.integers(image_size, image_size * 5 // 4 + 1)))
    left = int(generator.integers(image.width - image_size + 1))
    top = int(generator.integers(image.height - image_size + 1))
    return image.crop((left, top, left + image_size, top + image_size))


def _shorter_side_to(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise ValueError(f"an image of {image.width}x{image.height} is too long to scale to {size}")
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _RefusedError(
            f"an image must hold at most {MAX_PIXELS} pixels, got {image.width}x{image.height}"
        )
    if min(image.size) < MIN_SIDE:
        raise _RefusedError(
            f"an image must be at least {MIN_SIDE} pixels wide and high, "
            f"got {image.width}x{image.height}"
        )


def _in_plain_colours(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode == "F":
        raise _RefusedError("an image of floating-point values has no stated white")
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    image = in_srgb(image, profile)
    plain_mode = "L" if image.mode in GREY_MODES else "RGB"
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return image.convert(plain_mode)


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)  # (H, W)
    if values.min() < 0 or values.max() > 65535:
        raise _RefusedError(f"16-bit values must lie in [0, 65535], got {values.max()}")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257
