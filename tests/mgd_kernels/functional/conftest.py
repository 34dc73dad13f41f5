"""Fixtures of the tests of operators with fused second derivatives."""

from __future__ import annotations

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel


@pytest.fixture(autouse=True)
def _torch_attention_that_has_second_derivatives():
    with sdpa_kernel(SDPBackend.MATH):
        yield
