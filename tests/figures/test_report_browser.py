"""A report in a real browser, at the widths of a desktop and of a phone."""

import numpy as np
import pytest

from remixdit.figures.grids import image_grid
from remixdit.figures.html import Commands, Heading, Picture, Table, Text, write_report
from tests.browser import chromium

pytestmark = pytest.mark.long


@pytest.mark.parametrize(("width", "height"), [(1100, 800), (390, 844)])
def test_a_report_is_not_scrolled_sideways(width, height, tmp_path):
    images = np.zeros((40, 32, 32, 3), np.uint8)
    header = [f"a column of some width {number}" for number in range(12)]
    blocks = [
        Heading("Figures"),
        Text("word " * 200),
        Picture(image_grid(images, 20), "A grid of 20 columns.", "Grid"),
        Table(header, [["+12.34 ± 5.67 (3/3)"] * 12] * 3, caption="sentence " * 60),
        Commands(["remixdit sample " + "--an-option-of-some-length " * 20]),
    ]
    write_report(tmp_path / "report.html", "Study", blocks)
    browser = chromium(width, height)
    try:
        browser.get((tmp_path / "report.html").as_uri())
        wide, seen = browser.execute_script(
            "return [document.documentElement.scrollWidth, window.innerWidth]"
        )
    finally:
        browser.quit()
    assert wide <= seen
