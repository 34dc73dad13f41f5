"""The documentation as a site: pages, public names in the reference, links."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

import mgd
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


def test_the_site_is_built_strictly(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "reference/training/index.html").read_text("utf-8")
    assert 'id="mgd.TrainingFunction.metagradient"' in reference
    assert "<strong>per_example</strong>" in reference  # a line of the docstring as an item of a list
    assert "small_training" not in (tmp_path / "memory/index.html").read_text("utf-8")  # hidden code
