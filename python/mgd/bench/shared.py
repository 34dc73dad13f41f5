"""What the benchmarks' commands share: their options, how they begin, and the cells of their tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mgd.ui import machine
from mgd.ui.console import Session
from mgd.util.text import format_bytes

Core = Annotated[
    int,
    typer.Option("--core", help="The core to run on. -1: the last one; -2: let the system decide."),
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="How often everything is timed, in alternation.")]
Memory = Annotated[bool, typer.Option(help="Measure peak memory, each method in a process of its own.")]
Target = Annotated[
    str, typer.Argument(metavar="SCRIPT.py:FUNCTION", help="FUNCTION takes nothing and returns (TrainingFunction, z).")
]
Shorter = Annotated[int | None, typer.Option("--steps", min=1, help="Run only this many training steps.")]


def begin(command: str, out: Path | None, json: Path | None) -> tuple[Session, dict[str, Any]]:
    """The session of a benchmark, and the conditions it runs under, which it says first."""
    session, where = Session(command, out, json), machine.conditions()
    session.print(machine.describe(where))
    return session, where


def core_of(option: int) -> int | None:
    """The core as `timing.pinned` takes it."""
    return None if option == -2 else option


def ratio(quantiles: dict[str, float], digits: int = 2) -> str:
    """ "3.67 (3.60 - 3.71)": the median, and the 20% and 80% quantiles."""
    return f"{quantiles['median']:.{digits}f} ({quantiles['q20']:.{digits}f} - {quantiles['q80']:.{digits}f})"


def memory(count: float | None, extrapolated: bool = False) -> str:
    return "-" if count is None else ("~" if extrapolated else "") + format_bytes(max(0, count))
