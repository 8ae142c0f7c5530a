"""Pictures with an embedded colour profile become the sRGB that their photographer saw."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from remixdit.data import EncodeConfig, ShardDataset, encode, open_source
from remixdit.images.decoding import decode
from tests import icc

COLOURS = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
ADOBE_RGB = icc.matrix_profile(icc.ADOBE_RGB, icc.gamma_curve(icc.ADOBE_GAMMA))
DISPLAY_P3 = icc.matrix_profile(icc.DISPLAY_P3, icc.srgb_curve())
PILLOWS_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def decoded(image: Image.Image, profile: bytes | None, kind: str = "PNG", **options) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, kind, icc_profile=profile, **options)
    return np.asarray(decode(file.getvalue()), np.int64)


def by_hand(colours: np.ndarray, primaries: np.ndarray, gamma: float | None) -> np.ndarray:
    """Curve, matrix, matrix, curve: what a matrix profile means, in floating point."""
    values = colours / 255
    linear = icc.srgb_decoded(values) if gamma is None else values**gamma
    in_srgb = linear @ (np.linalg.inv(icc.SRGB) @ primaries).T
    return 255 * icc.srgb_encoded(in_srgb)


@pytest.mark.parametrize(
    ("profile", "primaries", "gamma"),
    [(ADOBE_RGB, icc.ADOBE_RGB, icc.ADOBE_GAMMA), (DISPLAY_P3, icc.DISPLAY_P3, None)],
    ids=["Adobe RGB", "Display P3"],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_wide_gamut_is_converted_to_srgb(profile, primaries, gamma, kind):
    found = decoded(Image.fromarray(COLOURS), profile, kind)
    assert np.abs(found - by_hand(COLOURS, primaries, gamma)).max() <= 2
    assert np.abs(found - COLOURS).max() > 20


def test_a_jpeg_of_a_camera_is_converted():
    flat = Image.new("RGB", (16, 16), (90, 160, 110))
    found = decoded(flat, ADOBE_RGB, "JPEG", quality=100)
    expected = by_hand(np.array([90, 160, 110]), icc.ADOBE_RGB, icc.ADOBE_GAMMA)
    assert np.abs(found - expected).max() <= 3


def test_ink_becomes_the_colour_that_it_prints():
    inks = np.array([[0.02, 0.35, 0.75], [0.75, 0.02, 0.2], [0.9, 0.75, 0.02]])  # as of a press
    profile = icc.press_profile(inks)
    for ink, values in enumerate([(255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0)]):
        found = decoded(Image.new("CMYK", (16, 16), values), profile, "TIFF")
        assert np.abs(found - 255 * icc.srgb_encoded(inks[ink])).max() <= 6  # 8 bits of Lab
    for values, expected in (((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0)):
        found = decoded(Image.new("CMYK", (16, 16), values), profile, "JPEG", quality=100)
        assert np.abs(found - expected).max() <= 4


def test_grey_stays_grey_with_the_tones_of_its_profile():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = decoded(Image.fromarray(ramp), icc.grey_profile(icc.gamma_curve(1.75)))
    assert found.shape == (16, 16)
    assert np.abs(found - 255 * icc.srgb_encoded((ramp / 255) ** 1.75)).max() <= 2
    sixteen = Image.fromarray(ramp.astype(np.uint16) * 257)
    assert np.array_equal(decoded(sixteen, icc.grey_profile(icc.gamma_curve(1.75))), found)


def test_a_palette_is_converted():
    image = Image.fromarray(COLOURS).quantize(16)
    expected = by_hand(np.asarray(image.convert("RGB")), icc.ADOBE_RGB, icc.ADOBE_GAMMA)
    assert np.abs(decoded(image, ADOBE_RGB) - expected).max() <= 2


def test_transparency_is_laid_on_white_after_the_colours_are_converted():
    colour = np.array([30, 160, 60])
    expected = by_hand(colour, icc.ADOBE_RGB, icc.ADOBE_GAMMA)
    for alpha in (0, 128, 255):
        image = Image.new("RGBA", (9, 9), (*colour.tolist(), alpha))
        on_white = expected * alpha / 255 + 255 * (1 - alpha / 255)
        assert np.abs(decoded(image, ADOBE_RGB) - on_white).max() <= 2


def test_rotation_and_profile_are_both_applied():
    image = Image.fromarray(COLOURS[:9])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decoded(image, ADOBE_RGB, exif=exif)
    assert np.array_equal(turned, np.rot90(decoded(image, ADOBE_RGB), -1))


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("none", None),
        ("Pillow's", PILLOWS_SRGB),
        ("as a table", icc.matrix_profile(icc.SRGB, icc.srgb_curve())),
    ],
)
def test_srgb_keeps_its_pixels(name, profile):
    assert np.array_equal(decoded(Image.fromarray(COLOURS), profile), COLOURS)


@pytest.mark.parametrize(
    "profile",
    [
        b"no profile",
        ADOBE_RGB[:200],
        ADOBE_RGB.replace(b"rTRC", b"xTRC"),
        icc.grey_profile(icc.gamma_curve(1.75)),
        icc.press_profile(np.full((3, 3), 0.5)),
    ],
    ids=["noise", "cut short", "without a curve", "of grey", "of a press"],
)
def test_a_broken_or_foreign_profile_is_ignored_and_the_picture_kept(profile):
    assert np.array_equal(decoded(Image.fromarray(COLOURS), profile), COLOURS)


def test_cmyk_without_a_usable_profile_is_converted_as_before():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    plain = decoded(image, None, "TIFF")
    assert np.array_equal(decoded(image, b"no profile", "TIFF"), plain)
    assert np.array_equal(decoded(image, ADOBE_RGB, "TIFF"), plain)


def test_encoding_in_threads_gives_the_same_pixels(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(40):
        colours = np.roll(COLOURS, number, axis=0)
        profile = (None, ADOBE_RGB, DISPLAY_P3)[number % 3]
        Image.fromarray(colours).save(tmp_path / "photos" / f"{number:02}.png", icc_profile=profile)
    source = open_source(tmp_path / "photos")
    list(encode(source, tmp_path / "out", EncodeConfig(image_size=12, batch_size=1)))
    stored = ShardDataset(tmp_path / "out").rows(np.arange(40))
    one_by_one = [np.asarray(source.load(index)[0]).transpose(2, 0, 1) for index in range(40)]
    assert np.array_equal(stored, one_by_one)
