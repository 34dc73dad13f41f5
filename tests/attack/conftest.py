"""Attacks across layers, in two sizes: a quick one in every run of the suite, and the full one of `make attack`.

The environment variable MGD_ATTACK=full chooses the full size.
"""

from __future__ import annotations

import os

import pytest
from victim import Victim

from mgd_kernels import _core


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether to attack in full size."""
    return os.environ.get("MGD_ATTACK", "") == "full"


@pytest.fixture(scope="session")
def victim(tmp_path_factory):
    """Runs metagradients in processes of their own."""
    if not hasattr(_core, "store_inject"):
        pytest.skip("the extension was built without the CMake option MGD_FAULT_INJECTION")
    victim = Victim(tmp_path_factory.mktemp("victim"))
    yield victim
    victim.close()
