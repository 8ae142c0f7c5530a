import re
from base64 import b64decode
from io import BytesIO
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from remixdit.figures import grids, plots
from remixdit.figures.html import Commands, Heading, Picture, Table, Text, write_report

HTML = "{http://www.w3.org/1999/xhtml}"


def parsed(path):
    """Parse a report strictly: an unclosed tag or an unescaped letter is an error."""
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


def texts(root, tag):
    return ["".join(element.itertext()) for element in root.iter(HTML + tag)]


def written(tmp_path, *blocks, title="Report"):
    write_report(tmp_path / "report.html", title, blocks)
    return parsed(tmp_path / "report.html")


def test_blocks_appear_in_order(tmp_path):
    root = written(
        tmp_path,
        Heading("Loss"),
        Text("First.\n\nSecond."),
        Table(["name"], [["plain"]]),
        Commands(["remixdit train tiny", "remixdit plot runs/1"]),
        title="Quick start",
    )
    body = root.find(HTML + "body")
    tags = [element.tag.removeprefix(HTML) for element in body]
    assert tags == ["h1", "h2", "p", "p", "div", "pre"]
    assert texts(root, "title") == texts(root, "h1") == ["Quick start"]
    assert texts(root, "code") == ["remixdit train tiny\nremixdit plot runs/1"]


def test_markup_in_a_text_is_shown_not_obeyed(tmp_path):
    evil = "<script>alert(1)</script> & \"'"
    root = written(
        tmp_path,
        Heading(evil),
        Text(evil),
        Table([evil], [[evil]], caption=evil),
        Picture(Image.new("RGB", (2, 2)), evil, alt=evil),
        Commands([evil]),
        title=evil,
    )
    for tag in ("title", "h1", "h2", "p", "th", "td", "caption", "figcaption", "code"):
        assert texts(root, tag) == [evil]
    assert next(root.iter(HTML + "img")).get("alt") == evil
    assert not list(root.iter(HTML + "script"))


def test_nothing_is_fetched(tmp_path):
    figure = plots.loss_curve({"a": ([1, 2], [1.0, 2.0])})
    root = written(tmp_path, Picture(figure, "Loss", alt="A curve"))
    references = [
        value
        for element in root.iter()
        for name, value in element.attrib.items()
        if name in {"src", "href", "srcset", "data"}
    ]
    assert references
    assert all(value.startswith("data:") for value in references)
    assert not re.search(r"url\(|@import", texts(root, "style")[0])


def test_image_is_inlined_pixel_for_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    root = written(tmp_path, Picture(Image.fromarray(pixels), "Samples", alt="Noise"))
    image = next(root.iter(HTML + "img"))
    encoded = image.get("src").removeprefix("data:image/png;base64,")
    assert np.array_equal(np.asarray(Image.open(BytesIO(b64decode(encoded)))), pixels)
    assert image.get("width") == "30"


def test_figure_is_as_wide_as_its_inches(tmp_path):
    figure = plots.loss_curve({"a": ([1, 2], [1.0, 2.0])})
    image = next(written(tmp_path, Picture(figure, "Loss", alt="A curve")).iter(HTML + "img"))
    assert image.get("width") == "1000"


def test_columns_of_numbers_are_set_flush_right(tmp_path):
    rows = [["plain", 0.123456, "1.0 ± 0.1", "", 3], ["remix", 12345.6, "-5 %", "2.0", 1000000]]
    root = written(tmp_path, Table(["model", "loss", "change", "FID", "steps"], rows))
    cells = list(root.iter(HTML + "td"))
    assert [cell.get("class") for cell in cells[:5]] == [None, *["number"] * 4]
    assert [cell.text for cell in cells[:5]] == ["plain", "0.1235", "1.0 ± 0.1", None, "3"]
    assert [cell.text for cell in cells[5:]] == ["remix", "1.235e+04", "-5 %", "2.0", "1000000"]


def test_table_may_have_no_rows(tmp_path):
    root = written(tmp_path, Table(["model", "loss"], []))
    assert texts(root, "th") == ["model", "loss"]
    assert not texts(root, "td")


def test_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="row must have 2 cells, got"):
        Table(["model", "loss"], [["plain"]])


def test_letters_of_all_scripts_survive(tmp_path):
    assert texts(written(tmp_path, Text("été мышь 鸟 🙂")), "p") == ["été мышь 鸟 🙂"]


def test_name_that_is_no_unicode_is_shown_escaped(tmp_path):
    broken = b"caf\xe9".decode("utf-8", errors="surrogateescape")
    assert texts(written(tmp_path, Text(broken)), "p") == ["caf\\udce9"]


def test_failed_report_leaves_the_old_one_and_nothing_beside(tmp_path):
    written(tmp_path, Text("old"))
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(OSError, match=r"taken\.html"):
        write_report(tmp_path / "taken.html", "Report", [Text("new")])
    with pytest.raises(AttributeError):
        write_report(tmp_path / "report.html", "Report", [Text(None)])
    assert texts(parsed(tmp_path / "report.html"), "p") == ["old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "taken.html"]


def test_six_figures_stay_under_three_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    boundaries = np.arange(21) * 50
    losses = {name: rng.random(20) + 0.1 for name in ("continued", "remix", "experts")}
    steps = np.arange(2000)
    digits = rng.integers(0, 256, (80, 28, 28, 1), dtype=np.uint8)
    pictures = [
        plots.coefficients_heatmap(rng.dirichlet(np.ones(4), size=20), boundaries),
        plots.loss_by_interval(losses, boundaries),
        plots.loss_matrix(rng.random((20, 20)) + 0.1, boundaries),
        plots.loss_curve({name: (steps, rng.random(2000) + 0.1) for name in losses}),
        plots.gradient_curve(steps, rng.random(2000), rng.random(2000)),
        grids.image_grid(digits, columns=10),
    ]
    written(tmp_path, *(Picture(picture, "Caption", alt="Picture") for picture in pictures))
    assert (tmp_path / "report.html").stat().st_size < 3e6
