"""Optional packages: asked for before the work that needs them."""

from __future__ import annotations

import importlib.util

from mgd.errors import MissingPackage


def require(purpose: str, extra: str, *modules: str) -> None:
    """Raise MissingPackage for the first of these modules that is not installed. None is imported."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingPackage(purpose, {"sklearn": "scikit-learn"}.get(module, module), extra)
