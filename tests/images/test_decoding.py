"""Image files of every kind become the pixels that a photographer means, or are refused by name."""

import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin, features

from remixdit.data import EncodeConfig, ShardDataset, encode, open_source
from remixdit.images import decoding
from remixdit.images.decoding import center_crop, decode, random_crop
from remixdit.images.room import Room


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixel(image: Image.Image) -> tuple[int, ...]:
    value = image.getpixel((4, 4))
    return value if isinstance(value, tuple) else (value,)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    draws = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(draws).convert(mode)


def test_a_palette_becomes_its_colours():
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, 255, 128, 0])
    assert pixel(decode(encoded(image))) == (255, 128, 0)


def test_what_is_transparent_is_white_not_what_hides_beneath():
    assert pixel(decode(encoded(Image.new("RGBA", (9, 9), (255, 0, 0, 0))))) == (255, 255, 255)
    half = decode(encoded(Image.new("RGBA", (9, 9), (255, 0, 0, 128))))
    assert pixel(half) == (255, 127, 127)
    assert pixel(decode(encoded(Image.new("LA", (9, 9), (0, 0))))) == (255,)


def test_a_transparent_palette_entry_is_white():
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, 255, 128, 0])
    assert pixel(decode(encoded(image, "GIF", transparency=1))) == (255, 255, 255)
    half = encoded(image, "PNG", transparency=bytes([255, 128]))  # an opacity for each entry
    assert pixel(decode(half)) == (255, 191, 127)


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # cyan 0, magenta and yellow full: red
    red, green, blue = pixel(decode(encoded(image, "JPEG", quality=100)))
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (32896, 128), (65535, 255)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind, value, expected):
    image = Image.fromarray(np.full((9, 9), value, np.uint16))
    assert pixel(decode(encoded(image, kind))) == (expected,)


def test_one_bit_is_black_and_white():
    assert pixel(decode(encoded(Image.new("1", (9, 9), 1)))) == (255,)


def test_the_camera_rotation_is_applied():
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (0, 0, 10, 10))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    upright = decode(encoded(image, "PNG", exif=exif))
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == (0, 0, 255)
    assert upright.getpixel((5, 17)) == (255, 0, 0)


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixel(decode(content)) == (255, 0, 0)


@pytest.mark.parametrize("kind", decoding.FORMATS)
def test_every_format_of_pictures_is_read(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    assert decode(encoded(noise(12, 9), kind)).size == (12, 9)


@pytest.mark.parametrize("kind", ["EPS", "DDS", "ICO", "TGA", "PCX", "SGI", "BLP"])
def test_no_other_format_is_opened(monkeypatch, kind):
    """A picture called cat.jpg that begins with %!PS went to Ghostscript."""
    content = encoded(noise(16, 16, "P" if kind == "BLP" else "RGB"), kind)
    Image.init()
    monkeypatch.setitem(Image.OPEN, kind, (pytest.fail, lambda prefix: True))
    with pytest.raises(ValueError, match=r"no known image format \(JPEG, PNG, .*\)"):
        decode(content)
    assert decoding.is_grey(content)


CUT_EXIF = [
    b"II*\0\x08",  # struct.error
    b"II*\0\xff\xff\xff\xff",
    b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",  # orientation 99
]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", CUT_EXIF)
def test_a_picture_whose_exif_is_damaged_stays(exif):
    content = encoded(noise(20, 10), "JPEG", exif=b"Exif\0\0" + exif)
    assert decode(content).size == (20, 10)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_that_of_pillow(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(noise(20, 10), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(np.asarray(decode(content)), np.asarray(expected))


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, struct.error, RecursionError])
def test_whatever_a_decoder_raises_is_a_skipped_image(tmp_path, monkeypatch, error):
    for name in ("bad.png", "good.bmp"):
        noise(20, 20).save(tmp_path / name)

    def raises(image: Image.Image) -> None:
        raise error("damaged")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", raises)
    config = EncodeConfig(image_size=16, channels=3)
    list(encode(open_source(tmp_path), tmp_path / "out", config))
    (skipped,) = ShardDataset(tmp_path / "out").index["skipped"]
    assert skipped["reason"] == "the image cannot be decoded: damaged"


def test_pictures_in_all_threads_share_one_room():
    room, most, held = Room(100), 0, threading.Lock()

    def take(num_pixels: int) -> None:
        nonlocal most
        with room.of(num_pixels), held:
            most = max(most, room.taken)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, [100, 60, 40, 30] * 50))
    assert most <= 100
    assert room.taken == 0


def test_what_is_decoded_holds_its_room(monkeypatch):
    content, taken = encoded(noise(20, 10)), []
    load = PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(
        PngImagePlugin.PngImageFile,
        "load",
        lambda image: (taken.append(decoding.room.taken), load(image)),
    )
    decode(content)
    assert taken[0] == 200
    assert decoding.room.taken == 0


def adm_center_crop(image: Image.Image, image_size: int) -> np.ndarray:
    """As in guided-diffusion's image_datasets.py."""
    while min(*image.size) >= 2 * image_size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = image_size / min(*image.size)
    size = tuple(round(x * scale) for x in image.size)
    pixels = np.array(image.resize(size, resample=Image.Resampling.BICUBIC))
    top = (pixels.shape[0] - image_size) // 2
    left = (pixels.shape[1] - image_size) // 2
    return pixels[top : top + image_size, left : left + image_size]


@pytest.mark.parametrize("size", [(32, 32), (31, 45), (500, 375), (64, 257), (9, 20), (1000, 33)])
def test_the_crop_is_that_of_adm(size):
    image = noise(*size)
    assert np.array_equal(np.asarray(center_crop(image, 32)), adm_center_crop(image, 32))


def test_a_strip_too_long_to_scale_is_refused():
    with pytest.raises(ValueError, match="an image of 1000000x8 is too long to scale to 64"):
        center_crop(Image.new("L", (1_000_000, 8)), 64)


def test_a_random_crop_is_a_part_of_the_picture():
    crops = [random_crop(noise(40, 60), 32, np.random.default_rng(seed)) for seed in range(50)]
    assert {crop.size for crop in crops} == {(32, 32)}
    assert len({crop.tobytes() for crop in crops}) > 40


def test_random_crops_depend_on_seed_and_image_alone(tmp_path):
    np.savez(tmp_path / "a.npz", np.asarray(noise(40, 80)).reshape(2, 40, 40, 3))
    stored = []
    for number, (seed, shard_size) in enumerate([(0, 2), (0, 1), (1, 2)]):
        config = EncodeConfig(image_size=16, crop="random", seed=seed, shard_size=shard_size)
        list(encode(open_source(tmp_path / "a.npz"), tmp_path / str(number), config))
        stored.append(ShardDataset(tmp_path / str(number)).rows(np.arange(2)))
    assert np.array_equal(stored[0], stored[1])
    assert not np.array_equal(stored[0], stored[2])


def huge_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


JPEG = encoded(noise(64, 64), "JPEG")
BAD_FILES = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "empty.png": (b"", "the file is empty"),
    "text.png": (b"This is no image.", "the file is of no known image format"),
    "dot.png": (encoded(Image.new("RGB", (1, 1))), "at least 8 pixels wide and high, got 1x1"),
    "bomb.png": (huge_png(30_000, 30_000), "pixels"),
    "large.png": (huge_png(8_192, 8_193), "at most 67108864 pixels, got 8192x8193"),
    "float.tiff": (encoded(Image.new("F", (9, 9)), "TIFF"), "no stated white"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_skipped_with_its_reason_or_refused(tmp_path, name):
    content, reason = BAD_FILES[name]
    root = tmp_path / "photos"
    root.mkdir()
    (root / name).write_bytes(content)
    noise(20, 20).save(root / "good.png")
    config = EncodeConfig(image_size=16, channels=3)
    progress = list(encode(open_source(root), tmp_path / "out", config))[-1]
    assert progress == ("encode", 2, 2, "1 skipped")
    dataset = ShardDataset(tmp_path / "out")
    assert len(dataset) == 1
    (skipped,) = dataset.index["skipped"]
    assert skipped["image"] == name
    assert reason in skipped["reason"]
    assert "0x" not in skipped["reason"]  # an address in memory would differ from run to run
    strict = EncodeConfig(image_size=16, channels=3, strict=True)
    with pytest.raises(ValueError, match=f"^{name}: .*{reason}"):
        list(encode(open_source(root), tmp_path / "strict", strict))
    assert not (tmp_path / "strict").exists()


def test_a_wrong_extension_does_not_matter(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(noise(20, 20), "PNG"))
    assert open_source(tmp_path).load(0)[0].size == (20, 20)


def test_nothing_but_bad_files_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "empty.png").touch()
    with pytest.raises(ValueError, match=r"no image of photos can be read, such as empty.png: the"):
        list(
            encode(open_source(tmp_path / "photos"), tmp_path / "out", EncodeConfig(image_size=16))
        )
    assert not (tmp_path / "out").exists()


FULL_DISK = """
import resource, sys
from remixdit.data import EncodeConfig, encode, open_source
source = open_source(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    for progress in encode(source, sys.argv[2], EncodeConfig(image_size=32, shard_size=10)):
        pass
except OSError as error:
    print(error)
"""


def test_no_room_in_the_middle_of_a_shard_is_a_clear_error_and_work_goes_on(tmp_path):
    """A limit on the size of files stands in for the disk: the kernel refuses the same write."""
    np.savez(tmp_path / "a.npz", np.zeros((30, 32, 32, 3), np.uint8))
    shard_bytes = 10 * 32 * 32 * 3 + 128
    arguments = [tmp_path / "a.npz", tmp_path / "out", shard_bytes - 100]
    shown = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.startswith("cannot write ")
    assert "File too large; finished shards stay, and the same command continues" in shown.stdout
    assert not list((tmp_path / "out").glob("*.npy*"))
    config = EncodeConfig(image_size=32, shard_size=10)
    list(encode(open_source(tmp_path / "a.npz"), tmp_path / "out", config))
    assert len(ShardDataset(tmp_path / "out")) == 30


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_a_clear_error_and_finished_shards_stay(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((100, 64, 64, 3), np.uint8))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        config = EncodeConfig(image_size=64, shard_size=10)
        with pytest.raises(OSError, match="No space left on device; finished shards stay"):
            list(encode(open_source(tmp_path / "a.npz"), disk / "out", config))
        kept = sorted(path.name for path in (disk / "out").glob("*.npy*"))
        assert kept == [f"latents-0000{number}.npy" for number in range(4)]
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        list(encode(open_source(tmp_path / "a.npz"), disk / "out", config))
        assert len(ShardDataset(disk / "out")) == 100
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_without_permission_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((3, 32, 32, 3), np.uint8))
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OSError, match=r"cannot write .*locked/out: Permission denied"):
        list(
            encode(
                open_source(tmp_path / "a.npz"),
                tmp_path / "locked" / "out",
                EncodeConfig(image_size=16),
            )
        )


def test_an_output_that_is_a_file_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((3, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"cannot write .*a.npz.*: Not a directory"):
        list(
            encode(open_source(tmp_path / "a.npz"), tmp_path / "a.npz", EncodeConfig(image_size=16))
        )
