"""A command's result as JSON, and how it came about."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
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


def provenance(command: str, result: dict[str, Any]) -> str:
    """For the foot of a page: the command, the versions, the seed and data of the result where it names them, and the
    page of the documentation."""
    import torch

    from mgd_kernels import __version__

    words = sys.argv[1:] if Path(sys.argv[0]).name == "mgd" else command.split()
    facts = [f"mgd-kernels {__version__}", f"torch {torch.__version__}", time.strftime("%Y-%m-%d")]
    seed, data = (result.get(key, result.get("settings", {}).get(key)) for key in ("seed", "data"))
    if isinstance(data, dict):
        data = data.get("name")
    facts += [f"seed {seed}"] if seed is not None else []
    facts += [f"data: {data}"] if data else []
    return f"{shlex.join(['mgd', *words])}\n{', '.join(facts)}\nExplained in {documented(command)}"


def documented(command: str) -> str:
    """The page of the documentation, in a checkout of the project."""
    group, _, name = command.partition(" ")
    if group == "recipe":
        return f"docs/recipes/{name}.md"
    return {"demo": "docs/install.md", "plan": "docs/planning.md", "bench": "docs/speed.md"}.get(group, "README.md")
