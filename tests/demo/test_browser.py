"""The page in a real browser, at the widths of a desktop and of a phone."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.browser import chromium
from tests.command_line import save_model

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """The page of a tiny model, from the command; or the one that PAGE names."""
    if "PAGE" in os.environ:
        yield os.environ["PAGE"]
        return
    if find_spec("gradio") is None:
        pytest.skip("needs Gradio: pip install 'remixdit[demo]'")
    root = tmp_path_factory.mktemp("models")
    remixed, plain = (save_model(root / str(n), n, num_experts=n) for n in (5, 1))
    command = [sys.executable, "-m", "remixdit", "demo", str(remixed), "--against", str(plain)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            lines = iter(server.stderr.readline, "")
            yield next(line.split()[2] for line in lines if line.startswith("remixdit: open http"))
        finally:
            server.terminate()


def seen(browser, text: str) -> bool:
    return browser.execute_script("return document.body.innerText.includes(arguments[0])", text)


def wait_for(browser, text: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not seen(browser, text):
        assert time.monotonic() < end, f"{text!r} did not appear"
        time.sleep(0.05)


def press(browser, text: str) -> None:
    xpath = f"//button[normalize-space()='{text}'] | //label[normalize-space()='{text}']"
    browser.execute_script("arguments[0].click()", browser.find_element("xpath", xpath))


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_a_person_draws_compares_and_downloads(address, width, height):
    browser = chromium(width, height)
    try:
        browser.get(address)
        wait_for(browser, "What the experts are mixed from")
        press(browser, "one expert alone")
        wait_for(browser, "Expert that draws all steps alone")
        press(browser, "Draw")
        wait_for(browser, "Step ")  # images while they denoise
        wait_for(browser, "Finished after 50 steps")
        assert seen(browser, "expert 0 alone")
        count = "return document.querySelectorAll(arguments[0]).length"
        assert browser.execute_script(count, ".panel img") == 16
        assert browser.execute_script(count, ".strip img") == 16
        assert browser.execute_script(count, "a.download[href^='data:image/png']") == 2
        overflow = "return document.documentElement.scrollWidth - window.innerWidth"
        assert browser.execute_script(overflow) <= 0  # nothing scrolls sideways
        if "PICTURES" in os.environ:  # a folder for a picture of the whole page
            tall = browser.execute_script("return document.documentElement.scrollHeight")
            size = {"width": width, "height": tall, "deviceScaleFactor": 1, "mobile": width < 600}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            time.sleep(1)
            browser.save_screenshot(f"{os.environ['PICTURES']}/{width}.png")
    finally:
        browser.quit()
