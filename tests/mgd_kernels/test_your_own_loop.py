"""The page docs/your-own-loop.md runs as it stands: its own assertions are the test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "your-own-loop.md"


def test_the_page_runs_from_top_to_bottom():
    pytest.importorskip("torchopt")
    text = PAGE.read_text()
    blocks = [(match.start(), match[1]) for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL)]
    assert len(blocks) == 6
    dtype, namespace = torch.get_default_dtype(), {}
    try:
        for start, code in blocks:
            # Line numbers of the page, for the traceback.
            exec(compile("\n" * (text[:start].count("\n") + 1) + code, PAGE.name, "exec"), namespace)
    finally:
        torch.set_default_dtype(dtype)
    assert namespace["d_weights"].abs().min() > 0 and namespace["d_lr"].abs().min() > 0
