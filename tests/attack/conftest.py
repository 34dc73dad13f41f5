"""Attacks across layers, in two sizes: a quick one in every run of the suite, and the full one of `make attack`.

The environment variable MGD_ATTACK=full chooses the full size.
"""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether to attack in full size."""
    return os.environ.get("MGD_ATTACK", "") == "full"
