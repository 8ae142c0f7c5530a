"""Grids of images, their texts in all scripts, and strips."""

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.colors import to_rgb
from matplotlib.font_manager import fontManager

from remixdit.figures import fonts, grids, strips


def test_grid_shows_every_pixel_in_reading_order():
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 3), dtype=np.uint8)
    grid = np.asarray(grids.image_grid(images, columns=3, scale=2))
    pitch_y, pitch_x = 3 * 2 + grids.GAP, 4 * 2 + grids.GAP
    assert grid.shape == (2 * pitch_y + grids.GAP, 3 * pitch_x + grids.GAP, 3)
    for index, image in enumerate(images):
        top, left = grids.GAP + index // 3 * pitch_y, grids.GAP + index % 3 * pitch_x
        for offset in (0, 1):
            shown = grid[top + offset : top + 6 : 2, left + offset : left + 8 : 2]
            assert np.array_equal(shown, image)


def test_grey_images_are_enlarged_to_be_seen():
    images = np.zeros((1, 28, 28, 1), dtype=np.uint8)
    grid = grids.image_grid(images, columns=1)
    assert grid.mode == "RGB"
    assert grid.width - 2 * grids.GAP == 84


@pytest.mark.parametrize("label", ["7", "été", "мышь", "鸟", "🙂", "very " * 50, ""])
def test_labels_stay_below_their_image(label):
    images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    grid = np.asarray(grids.image_grid(images, columns=2, labels=[label, ""]).convert("L"))
    below = grid[grids.GAP + 64 :]
    assert (below[:, grids.GAP + 64 :] == 255).all()
    assert (below[:, : grids.GAP + 64] < 128).any() == bool(label)


def test_rows_are_labelled_in_a_margin():
    images = np.zeros((4, 64, 64, 3), dtype=np.uint8)
    plain = grids.image_grid(images, columns=2)
    labelled = grids.image_grid(images, columns=2, row_labels=["continued", "remix"])
    margin = labelled.width - plain.width
    assert 40 < margin <= grids.MAX_MARGIN
    right = labelled.crop((margin, 0, labelled.width, labelled.height))
    assert np.array_equal(np.asarray(right), np.asarray(plain))
    for top in (0, plain.height // 2):
        row = labelled.crop((0, top, margin, top + plain.height // 2))
        assert np.asarray(row).min() < 128


@pytest.mark.parametrize(
    ("shape", "dtype", "arguments", "message"),
    [
        ((2, 3, 8, 8), np.uint8, {}, "images must be"),
        ((2, 8, 8, 3), np.float32, {}, "images must be"),
        ((2, 8, 8, 3), np.uint8, {"columns": 0}, "columns must be at least 1, got 0"),
        ((2, 8, 8, 3), np.uint8, {"labels": ["one"]}, "labels must hold 2 texts, got 1"),
        ((2, 8, 8, 3), np.uint8, {"row_labels": ["a", "b"]}, "row_labels must hold 1 texts, got 2"),
    ],
)
def test_grid_refuses(shape, dtype, arguments, message):
    with pytest.raises(ValueError, match=message):
        grids.image_grid(np.zeros(shape, dtype=dtype), **{"columns": 2, **arguments})


def test_labels_of_columns_stand_below_the_last_row():
    images = np.zeros((4, 64, 64, 3), dtype=np.uint8)
    plain = np.asarray(grids.image_grid(images, columns=2))
    labelled = np.asarray(grids.image_grid(images, columns=2, labels=["cat", "dog"]))
    assert np.array_equal(labelled[: len(plain)], plain)
    assert labelled[len(plain) :].min() < 128


def test_a_title_moves_the_grid_down_as_it_is():
    images = np.random.default_rng(0).integers(0, 256, (9, 200, 200, 3), dtype=np.uint8)
    plain = np.asarray(grids.image_grid(images, columns=3))
    titled = np.asarray(grids.image_grid(images, columns=3, title="run\nstep 5, " + 200 * "x"))
    assert np.array_equal(titled[-len(plain) :], plain)
    assert titled[: -len(plain)].min() < 128


def test_a_frame_has_the_colour_of_its_image_on_every_side():
    images = np.full((2, 64, 64, 3), 255, dtype=np.uint8)
    grid = np.asarray(grids.image_grid(images, columns=2, frames=["#ff0000", "#0000ff"]))
    edge, side = grids.GAP, 64 + 2 * grids.FRAME
    first = grid[edge : edge + side, edge : edge + side]
    for line in (first[0], first[-1], first[:, 0], first[:, -1]):
        assert (line == (255, 0, 0)).all()
    assert (first[grids.FRAME : -grids.FRAME, grids.FRAME : -grids.FRAME] == 255).all()


@pytest.mark.parametrize("count", [1, 5, 16, 40, 64, 100])
@pytest.mark.parametrize("classes", [1, 2, 3, 10, 12, 1000])
def test_a_grid_is_near_square_and_keeps_a_class_in_its_column_where_it_can(count, classes):
    columns = grids.near_square(count, classes)
    rows = -(-count // columns)
    assert columns * rows >= count
    assert max(columns / rows, rows / columns) < 4
    if (count, classes) in {(40, 10), (100, 10), (64, 3), (100, 12)}:
        assert columns % classes == 0


def wrapped(text, room=100):
    return grids._wrapped(text, room)


def test_a_long_name_takes_two_lines_and_ends_in_an_ellipsis():
    assert wrapped("cat") == ["cat"]
    assert wrapped("Siberian husky dog") == ["Siberian", "husky dog"]
    first, second = wrapped("Staffordshire bullterrier, Staffordshire bull terrier")
    assert first == "Staffordshire"
    assert second.endswith("…")
    assert all(grids._length(line) <= 100 for line in wrapped("x" * 300))
    first, second = wrapped("abcdefghijklmnop")
    assert first.removesuffix("-") + second == "abcdefghijklmnop"


def test_a_word_is_broken_with_a_hyphen_and_three_letters_on_both_sides():
    first, second = wrapped("automobile", room=grids._length("automobil"))
    assert (first, second) == ("automob-", "ile")
    assert wrapped("automobile,", room=grids._length("automobil")) == ["automob-", "ile,"]
    assert wrapped("Straßenbahn", room=grids._length("Straßen-") + 2) == ["Straßen-", "bahn"]
    assert wrapped("b" * 8, room=grids._length("bb-")) == ["bb", "b…"]  # too narrow for that
    assert "-" not in "".join(wrapped("2024_07_31_13_59_59"))


@pytest.fixture
def kanji(tmp_path):
    """A font of this machine that has one letter that DejaVu lacks."""
    glyphs = {".notdef": None, "space": 32, "A": 65, "dog": ord("犬")}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({code: name for name, code in glyphs.items() if code})
    pen = TTGlyphPen(None)
    for number, place in enumerate([(0, 0), (0, 500), (500, 500), (500, 0)]):
        (pen.lineTo if number else pen.moveTo)(place)
    pen.closePath()
    builder.setupGlyf(dict.fromkeys(glyphs, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (600, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Kanji", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "kanji.ttf")
    before = list(fontManager.ttflist)
    fontManager.addfont(tmp_path / "kanji.ttf")
    fonts._font_for.cache_clear()
    yield str(tmp_path / "kanji.ttf")
    fontManager.ttflist[:] = before
    fonts._font_for.cache_clear()


def test_letters_that_dejavu_lacks_come_from_a_font_that_has_them(kanji):
    assert fonts.font_file("A犬") == kanji
    assert fonts.families("犬") == ["DejaVu Sans", "Kanji"]
    assert fonts.font_file("Aé") == fonts.DEJAVU
    assert fonts.class_texts([1, 0, 1], ["cat", "犬"]) == ["犬", "cat", "犬"]


def test_a_class_whose_letters_no_font_has_goes_by_its_number(monkeypatch):
    alone = [font for font in fontManager.ttflist if font.fname == fonts.DEJAVU]
    monkeypatch.setattr(fontManager, "ttflist", alone)
    fonts._font_for.cache_clear()
    try:
        assert fonts.class_texts([1, 0, 2], ["cat", "犬", "été\n"]) == ["class 1", "cat", "été\\n"]
        assert fonts.with_letters("run 犬") == "run \\u72ac"
        assert fonts.class_texts([1, 0], []) == []
    finally:
        fonts._font_for.cache_clear()


@pytest.mark.parametrize("num_experts", [2, 8, 100])
def test_colours_of_experts_are_told_apart_without_colour(num_experts):
    grey = [np.dot(to_rgb(c), (0.299, 0.587, 0.114)) for c in strips.expert_colors(num_experts)]
    assert (np.diff(grey) < 0).all()  # the noisiest, the last, is the darkest
    assert grey[0] - grey[-1] > 0.5


def test_a_strip_frames_each_moment_in_the_colour_of_its_expert():
    images = np.full((2, 3, 32, 32, 1), 255, dtype=np.uint8)  # R = 2, F = 3
    strip = strips.denoising_strips(images, [999, 500, 0], [4, 2, 0], 5)
    colors = strips.expert_colors(5)
    pitch = 4 * 32 + 2 * grids.FRAME + grids.GAP
    for row in range(2):
        for moment, expert in enumerate([4, 2, 0]):
            place = (grids.GAP + moment * pitch, grids.GAP + row * pitch)
            found = [value / 255 for value in strip.getpixel(place)]
            assert found == pytest.approx(to_rgb(colors[expert]), abs=0.01)
    key = np.asarray(strip)[2 * pitch + grids.GAP :].reshape(-1, 3)
    for color in colors:  # the key holds every expert, those of no moment too
        assert (key == np.round(np.multiply(to_rgb(color), 255)).astype(int)).all(1).any()


def test_a_plain_model_has_a_strip_without_colours():
    images = np.zeros((1, 2, 32, 32, 3), dtype=np.uint8)
    strip = np.asarray(strips.denoising_strips(images, [999, 0], [0, 0], 1)).astype(int)
    assert (strip.max(2) == strip.min(2)).all()
