"""Files of any format => pictures as a photographer means them => square uint8 pixels.

Decoding is Pillow's, colour profiles are LittleCMS's; what follows uses integer arithmetic only, so
the same file gives the same pixels on every platform. The crop is that of ADM (arXiv:2105.05233):
halve by box filter while the image is at least twice too large, resize by bicubic, cut the centre
out.

Shapes: C = 1 (grey) or 3 (red, green, blue), S = image_size.
"""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from remixdit.images.profiles import in_srgb

__all__ = ["MIN_SIDE", "center_crop", "decode", "is_grey", "random_crop", "square_pixels"]

MIN_SIDE = 8  # pixels: anything smaller is a tracking dot or an icon, not a picture
MAX_PIXELS = 178_956_970  # Pillow's own bound, past which a file counts as a decompression bomb
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
DECODING_ERRORS = (
    OSError,
    SyntaxError,  # what Pillow raises for a broken PNG
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


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
        with Image.open(io.BytesIO(encoded)) as image:
            _check_size(image)
            image.load()
            profile = image.info.get("icc_profile")
            return _in_plain_colours(ImageOps.exif_transpose(image), profile)
    except UnidentifiedImageError:
        # Pillow's own message holds a memory address, and would differ from run to run.
        raise ValueError("the file is of no known image format") from None
    except DECODING_ERRORS as error:
        raise ValueError(f"the image cannot be decoded: {error}") from error


def is_grey(encoded: bytes) -> bool:
    """Return whether the file is an image without colour, from its header alone."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.mode in ("P", "PA"):
                return False
            return image.mode in GREY_MODES
    except DECODING_ERRORS:
        return True  # not the place to complain: decode() does


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
        raise ValueError(
            f"an image must hold at most {MAX_PIXELS} pixels, got {image.width}x{image.height}"
        )
    if min(image.size) < MIN_SIDE:
        raise ValueError(
            f"an image must be at least {MIN_SIDE} pixels wide and high, "
            f"got {image.width}x{image.height}"
        )


def _in_plain_colours(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode == "F":
        raise ValueError("an image of floating-point values has no stated white")
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
        raise ValueError(f"16-bit values must lie in [0, 65535], got {values.max()}")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 255 * 257
