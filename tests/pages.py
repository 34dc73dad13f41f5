"""The Python blocks of a page of the documentation, and a way to run them.

The blocks of a page share one namespace and run from top to bottom. What a reader need not see stands in a comment of
the page, and runs in its place:

    <!-- setup
    import torch
    -->

A block that cannot run comes after a comment that says why: `<!-- not run: needs a GPU -->`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

BLOCK = re.compile(
    r"(<!-- not run: [^>]+ -->\n)?^```python\n(.*?)^```$|^<!-- setup\n(.*?)^-->$", re.DOTALL | re.MULTILINE
)


def blocks(page: Path) -> list[str]:
    """The code to run, with lines of the page's numbers for tracebacks."""
    text = page.read_text("utf-8")
    found = []
    for match in BLOCK.finditer(text):
        group = 2 if match[2] is not None else 3
        if not match[1]:
            found.append("\n" * text[: match.start(group)].count("\n") + match[group])
    return found


def run_page(page: Path) -> dict[str, Any]:
    """Run the blocks of a page, and give what they define. Their own assertions are the test."""
    namespace: dict[str, Any] = {}
    for code in blocks(page):
        exec(compile(code, str(page.relative_to(ROOT)), "exec"), namespace)
    return namespace
