"""Options that commands share, and how their words are read."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write pictures and an HTML page there.")]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="A folder with IDX files (MNIST, Fashion-MNIST) or CIFAR-10's Python batches. Default: Fashion-MNIST "
        "where it is installed, otherwise scikit-learn's digits.",
    ),
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Number of training steps.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Quick = Annotated[bool, typer.Option("--quick", help="A short run, of about a minute, on less data.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of torch and of the kernels.")]
Device = Annotated[str, typer.Option("--device", help='Where tensors live: "cpu", "cuda", "cuda:1".')]
Resume = Annotated[
    Path | None,
    typer.Option("--resume", metavar="DIR", help="Save the run there, and continue one that was interrupted."),
]

_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_names(text: str, known: Collection[str], what: str) -> list[str]:
    """Names from "a,b,c", all of them among the known ones. what: they are, in the plural, for the error."""
    from mgd.errors import BadArgument  # brings torch

    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise BadArgument(f"expected {what} among {', '.join(known)}; got {', '.join(unknown)}")
    return names


def parse_count(text: str, what: str = "parameters") -> int:
    """A number of parameters, or of something else, from text such as "124M", "1.5B", "7_000_000"."""
    from mgd.errors import BadArgument

    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmbt]?)\s*", text.lower().replace("_", "").replace(",", ""))
    if match is None or (count := round(float(match[1]) * _COUNTS[match[2]])) < 1:
        raise BadArgument(f'expected a number of {what} such as "124M" or 1000000; got {text!r}')
    return count
