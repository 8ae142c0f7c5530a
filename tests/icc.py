"""Colour profiles for tests, built byte by byte after ICC.1:2001-04 (version 2.4)."""

import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
# XYZ of red, green and blue, adapted to D50, in columns
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7142]])
ADOBE_RGB = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])
DISPLAY_P3 = np.array(
    [[0.5151, 0.292, 0.1571], [0.2412, 0.6923, 0.0666], [-0.0011, 0.0419, 0.7841]]
)
ADOBE_GAMMA = 563 / 256


def srgb_decoded(encoded: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1] => proportional to light."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def srgb_encoded(linear: np.ndarray) -> np.ndarray:
    """Proportional to light, in [0, 1] => sRGB."""
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def lab(linear: np.ndarray) -> np.ndarray:
    """Linear sRGB (3,) => CIE Lab of D50."""
    ratios = SRGB @ linear / np.array(D50)
    roots = np.where(ratios > 216 / 24389, np.cbrt(ratios), (24389 / 27 * ratios + 16) / 116)
    return np.array([116 * roots[1] - 16, 500 * (roots[0] - roots[1]), 200 * (roots[1] - roots[2])])


def matrix_profile(primaries: np.ndarray, curve: bytes) -> bytes:
    """A profile of a screen or camera: three curves, then a matrix to XYZ."""
    columns = zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T, strict=True)
    return profile(
        b"mntr",
        b"RGB ",
        b"XYZ ",
        {name: xyz(*column) for name, column in columns}
        | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    )


def grey_profile(curve: bytes) -> bytes:
    """A profile of grey pictures: one curve."""
    return profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": curve})


def press_profile(inks: np.ndarray) -> bytes:
    """A profile of a press.

    Args:
        inks: (3, 3) linear sRGB of full cyan, magenta and yellow on the paper.
    """
    nodes = []
    for index in range(16):  # black changes fastest
        cyan, magenta, yellow, black = (index >> place & 1 for place in (3, 2, 1, 0))
        light = np.prod(inks ** np.array([[cyan], [magenta], [yellow]]), axis=0) * (1 - black)
        lightness, a, b = lab(light)
        nodes += [round(lightness * 2.55), round(a) + 128, round(b) + 128]
    identity = struct.pack(">9i", *(65536 * np.eye(3, dtype=int).ravel()))
    table = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + 4 * table + bytes(nodes) + 3 * table
    return profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut})


def gamma_curve(gamma: float) -> bytes:
    """A power function."""
    return b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256))


def srgb_curve() -> bytes:
    """That of sRGB, as a table."""
    values = srgb_decoded(np.linspace(0, 1, 1024))
    return b"curv" + struct.pack(">II1024H", 0, 1024, *np.rint(65535 * values).astype(int))


def xyz(*values: float) -> bytes:
    """A colour, in fixed point."""
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * value) for value in values))


def profile(kind: bytes, colour_space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A header of 128 bytes, a table of tags, the tags."""
    tags = {b"wtpt": xyz(*D50), **tags}
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(
        ">I4sI4s4s4s", start + len(body), b"", 0x02400000, kind, colour_space, connection
    )
    date = struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    header += date + b"acsp" + bytes(28) + xyz(*D50)[8:]
    return header.ljust(128, b"\0") + table + body
