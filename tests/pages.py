"""Pages of the documentation whose code runs as it stands: their own assertions are the test."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def run_page(name: str, blocks: int) -> dict[str, Any]:
    """Run the Python blocks of a page from top to bottom, and give what they define."""
    text = (DOCS / name).read_text("utf-8")
    found = [(match.start(), match[1]) for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL)]
    assert len(found) == blocks
    namespace: dict[str, Any] = {}
    for start, code in found:
        # Line numbers of the page, for the traceback.
        exec(compile("\n" * (text[:start].count("\n") + 1) + code, name, "exec"), namespace)
    return namespace
