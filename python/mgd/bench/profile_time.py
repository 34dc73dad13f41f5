"""`mgd profile time SCRIPT.py:FUNCTION`: what a metagradient of your own training costs, and where the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mgd.bench import cases, shared, throughput
from mgd.bench.methods import METHODS
from mgd.ui.options import Json, Out, parse_names


def command(
    target: shared.Target,
    methods: Annotated[
        str, typer.Option("--methods", metavar="A,B,...", help=f"One or more of {', '.join(METHODS)}.")
    ] = "mgd,unrolled",
    rounds: shared.Rounds = 3,
    steps: shared.Shorter = None,
    core: shared.Core = -1,
    memory: shared.Memory = True,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Write a Chrome trace of one metagradient.")
    ] = None,
    out: Out = None,
    json: Json = None,
) -> None:
    """Time of a metagradient of your own training, by phase and in units of plain training; and its plan."""
    names = parse_names(methods, METHODS, "methods")
    case = cases.load(target, steps)
    session, where = shared.begin("profile time", out, json)
    with session.status() as tick:
        measured = throughput.measure(target, names, rounds, steps, case.device, shared.core_of(core), memory, tick)
    throughput.display(session, measured)
    session.print(f"\n{throughput.CAPTION}", style="dim")
    session.print("\nThe plan", style="bold")
    session.print(case.function.plan().explain(), whole=True)
    if trace:
        case.function.metagradient(case.z, profile=trace)
        session.print(f"\nwrote {trace}: open it in chrome://tracing or ui.perfetto.dev", whole=True)
    result = {"machine": where, "plan": case.function.plan().to_dict(), "results": [measured]}
    session.write(throughput.page([measured], where), result)
    if throughput.disagreeing([measured]):
        raise typer.Exit(1)
