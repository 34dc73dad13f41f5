"""`mgd profile memory SCRIPT.py:FUNCTION`: peak memory of a metagradient of your own training, against its length."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mgd.bench import cases, memory, peak, shared
from mgd.errors import BadArgument
from mgd.ui.options import Json, Out
from mgd.util.text import format_bytes, parse_bytes


def command(
    target: shared.Target,
    budgets: Annotated[
        str,
        typer.Option(
            "--budgets", metavar="SIZE,...", help="Budgets of host memory to compare with the one your training has."
        ),
    ] = "",
    steps: shared.Shorter = None,
    core: shared.Core = -1,
    out: Out = None,
    json: Json = None,
) -> None:
    """Peak memory of a metagradient of your own training, against its length and against unrolling it."""
    total = len(cases.load(target, steps))
    compared: dict[str, tuple[str, dict[str, Any]]] = {
        "torch unrolled": ("unrolled", {}),
        "torch all states": ("states", {}),
        "mgd, as set up": ("package", {}),
    }
    try:
        for budget in filter(None, budgets.split(",")):
            compared[f"mgd, {format_bytes(parse_bytes(budget))}"] = (
                "package",
                {"schedule": "auto", "budget": {"host": parse_bytes(budget)}},
            )
    except ValueError as error:
        raise BadArgument(str(error)) from error
    lengths = sorted({t for t in (*peak.PROBES, total // 4, total // 2, total) if 0 < t <= total})
    session, where = shared.begin("profile memory", out, json)
    with session.status() as tick:
        fits = total
        if total > peak.PROBES[1]:
            tick("unrolled: how many steps fit")
            try:
                fits = peak.extrapolated(target, "unrolled", total)["fits_steps"]
            except peak.Failed:
                pass  # the reason shows in the table
        measured = memory.measure(target, lengths, compared, fits, shared.core_of(core), tick)
    memory.display(session, measured)
    if fits < total:
        session.print(f"Unrolled, at most {fits:,} steps would fit in free memory here.")
    memory.finish(session, measured, where)
