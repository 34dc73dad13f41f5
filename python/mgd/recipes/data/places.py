"""Where the data sets are that are not Python packages."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from mgd.errors import BadData


def place(name: str) -> Path:
    """`$MGD_DATA/name`, by default `.data/name` in the working directory, where `make data` puts it."""
    return Path(os.environ.get("MGD_DATA", ".data")) / name


def folder(name: str, install: str) -> Path:
    """The `place` of a data set. Raises BadData where there is no such folder."""
    path = place(name)
    if not path.is_dir():
        raise BadData(f"expected the folder {path}: {install}, or set MGD_DATA to the folder that holds {name}")
    return path


def package(name: str, install: str) -> Path:
    """The folder of an installed Python package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise BadData(f"expected the package {name} to be installed: {install}")
    return Path(spec.submodule_search_locations[0])
