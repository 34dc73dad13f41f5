"""A command's result as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def write_json(path: Path, command: str, result: dict[str, Any]) -> None:
    """The result, with the command and the versions that produced it. NaN and infinities, which JSON lacks, become
    null."""
    import torch

    from mgd.util.files import write_file
    from mgd_kernels import __version__

    made_by = {"command": command, "version": __version__, "torch": torch.__version__}
    write_file(path, json.dumps(finite(made_by | result), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value in JSON's types: NaN and infinities become None, tuples become lists, and keys become strings."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
