"""The page docs/your-own-loop.md runs as it stands."""

import pytest
import torch

from pages import run_page


def test_the_page_runs_from_top_to_bottom():
    pytest.importorskip("torchopt")
    dtype = torch.get_default_dtype()
    try:
        namespace = run_page("your-own-loop.md", blocks=6)
    finally:
        torch.set_default_dtype(dtype)
    assert namespace["d_weights"].abs().min() > 0 and namespace["d_lr"].abs().min() > 0
