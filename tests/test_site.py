"""The documentation as a site: pages, public names in the reference, links; and how a browser shows it."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

import mgd
from browser import WIDTHS, chromium, resize
from pages import PAGES, ROOT

REFERENCE = "".join(page.read_text("utf-8") for page in PAGES if page.parent.name == "reference")


@pytest.mark.parametrize("package", ["mgd", "mgd_kernels", "mgd_kernels.functional"])
def test_every_public_name_is_in_the_reference(package):
    module = importlib.import_module(package)
    documented = set(re.findall(r"^::: (\S+)", REFERENCE, re.MULTILINE))
    for heading in re.findall(r"^## (.+)", REFERENCE, re.MULTILINE):  # what is made by a function has no source to read
        documented |= {f"mgd_kernels.functional.{name}" for name in heading.split(", ")}
    for name in module.__all__:
        value = getattr(module, name)
        home = f"{getattr(value, '__module__', '')}.{name}"  # where a function has the name of a module
        assert name == "__version__" or documented & {f"{package}.{name}", home}, name


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE))
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert pages <= listed


def test_links_between_pages_lead_somewhere():
    """Also without mkdocs, which looks at anchors as well."""
    for page in {*PAGES, *ROOT.glob("*.md"), *ROOT.glob("*/*.md")}:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_citation_is_of_this_version():
    assert f"\nversion: {mgd.__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_is_built(site):
    reference = (site / "reference/training/index.html").read_text("utf-8")
    assert 'id="mgd.TrainingFunction.metagradient"' in reference
    assert "<strong>per_example</strong>" in reference  # a line of the docstring as an item of a list
    assert "small_training" not in (site / "memory/index.html").read_text("utf-8")  # hidden code


@pytest.fixture(scope="module")
def address(site):
    """Of the site as a server gives it: the search asks for its index."""
    handler = partial(Quiet, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def test_pages_are_as_wide_as_the_screen_and_what_is_wider_scrolls_by_itself(site, address, browser):
    pages = sorted(page.parent.relative_to(site) for page in site.rglob("index.html"))
    assert len(pages) > 40
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": NO_WORKERS})
    for page in pages:
        browser.get(f"{address}/{page}/")
        for width in WIDTHS:
            resize(browser, width)
            assert browser.execute_script(TOO_WIDE, width) == [], f"{page} at {width} pixels"
        assert browser.execute_script(MISSING) == [], page
    assert browser.get_log("browser") == []


# A page has a worker read the whole index, which takes longer than all else.
NO_WORKERS = "if (!location.search) window.Worker = class extends EventTarget { postMessage() {} }"
# What of the page's content ends beyond the screen, unless it is in a box that scrolls.
TOO_WIDE = """
const scrolls = e => e && (['auto', 'scroll'].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
return [...document.querySelectorAll('.md-content *')]
  .filter(e => e.getBoundingClientRect().right > arguments[0] + 1 && !scrolls(e.parentElement))
  .map(e => e.outerHTML.slice(0, 150))
"""
MISSING = "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_word_is_found(address, browser, width):
    resize(browser, width)
    browser.get(f"{address}/?search")
    browser.execute_script("document.getElementById('__search').click()")
    box = browser.find_element("css selector", ".md-search__input")
    wait = pytest.importorskip("selenium.webdriver.support.wait").WebDriverWait(browser, 20)
    wait.until(lambda _: box.is_displayed() and box.is_enabled())
    box.send_keys("metasmoothness")
    found = wait.until(lambda _: browser.find_elements("css selector", ".md-search-result__link"))
    assert any("smoothness" in link.get_attribute("href") for link in found)
    assert browser.get_log("browser") == []
