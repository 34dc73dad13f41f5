"""The code in README and docs runs, page by page."""

from __future__ import annotations

import re

import pytest
import torch

from pages import PAGES, ROOT, blocks, run_page


@pytest.fixture
def untouched(monkeypatch, tmp_path):
    """A folder to write to; random numbers and the default dtype are as before at the end."""
    monkeypatch.chdir(tmp_path)
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng():
        yield
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("page", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES if blocks(p)])
def test_the_code_runs(page, untouched):
    run_page(page)


def test_no_block_is_overlooked():
    for page in PAGES:
        text = page.read_text("utf-8")
        found = len(re.findall(r"^ *```(python|py)\b", text, re.MULTILINE)) + text.count("<!-- setup")
        skipped = text.count("<!-- not run:")
        assert len(blocks(page)) == found - skipped, page


def test_a_block_that_cannot_run_is_left_out_and_a_hidden_one_is_not(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- setup\nx = 1\n-->\n```python\ny = x\n```\n<!-- not run: why -->\n```python\nz = y\n```\n```sh\nno\n```\n"
    )
    assert [code.strip() for code in blocks(page)] == ["x = 1", "y = x"]
    assert blocks(page)[1].count("\n") == 5  # it stands in line 5
