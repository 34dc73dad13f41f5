"""Fixtures of the state store's tests."""

from __future__ import annotations

import pytest

from mgd_kernels import _core


@pytest.fixture
def inject():
    """Makes system calls of the store fail: ``inject(kind, nth, times)``, until the test ends."""
    if not hasattr(_core, "store_inject"):
        pytest.skip("the extension was built without the CMake option MGD_FAULT_INJECTION")
    yield _core.store_inject
    _core.store_inject("none")
