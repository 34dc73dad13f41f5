"""Options that the commands share, and how their results are written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write pictures and an HTML page there.")]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="A folder with IDX files (MNIST, Fashion-MNIST) or CIFAR-10's Python batches. Without it: Fashion-MNIST "
        "where it is installed, else scikit-learn's digits.",
    ),
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Training steps.")]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random.")]
Quick = Annotated[bool, typer.Option("--quick", help="A version of a minute, on less data.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of torch and of the kernels.")]


def write_json(path: Path, command: str, result: dict[str, Any]) -> None:
    """The result with the command and the versions that made it. NaN and infinities, which JSON lacks, become null."""
    import torch

    from mgd_kernels import __version__

    made_by = {"command": command, "version": __version__, "torch": torch.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(made_by | result), indent=2, allow_nan=False) + "\n", "utf-8")


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
