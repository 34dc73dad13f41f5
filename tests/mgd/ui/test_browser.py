"""Pages as a browser shows them, on a desk and on a phone."""

from __future__ import annotations

import pytest

from browser import WIDTHS, chromium, resize
from mgd.ui.charts import figure
from mgd.ui.console import Session
from mgd.ui.page import Page, Section

CELL = "[...document.querySelectorAll('td')].find(cell => cell.textContent.includes('{}'))"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a page that has everything that could be too wide."""
    folder = tmp_path_factory.mktemp("page")
    header = ["phase", *(f"column {i}\nin seconds" for i in range(9))]
    rows = [header, ["training", *["1.234e-05"] * 9], ["    of it replayed", *["-0.5"] * 9]]

    def sections():
        fig, axes = figure(14, 3)
        axes.plot([1, 3, 2])
        return [
            Section("A picture", "Text " * 60, fig, "picture", rows),
            Section("A listing", listing="x" * 300 + "\n" + "y"),
        ]

    Session("recipe attribute", folder).write(Page("A title", "Lead", sections=sections), {"seed": 3, "data": "digits"})
    return (folder / "index.html").as_uri()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_is_as_wide_as_the_screen_and_what_is_wider_scrolls_by_itself(browser, address, width):
    resize(browser, width)
    browser.get(address)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return document.querySelector('img').naturalWidth") > 1000
    assert browser.execute_script("return document.querySelector('img').getBoundingClientRect().right") <= width
    number = browser.execute_script(f"return {CELL.format('e-05')}.getBoundingClientRect().height")
    assert number < 50  # in one line
    margin = browser.execute_script(f"return getComputedStyle({CELL.format('replayed')}).paddingLeft")
    assert float(margin.removesuffix("px")) > 15
    footer = browser.execute_script("return document.querySelector('footer').innerText")
    assert "mgd recipe attribute" in footer and "seed 3" in footer and "digits" in footer
    assert browser.get_log("browser") == []
