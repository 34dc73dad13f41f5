"""`mgd profile time SCRIPT.py:FUNCTION`: what a metagradient of your own training costs, and where the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mgd.bench import cases, show, throughput, timing
from mgd.bench.methods import METHODS, chosen
from mgd.ui.options import Json, Out

Target = Annotated[
    str, typer.Argument(metavar="SCRIPT.py:FUNCTION", help="FUNCTION takes nothing and returns (TrainingFunction, z).")
]
Shorter = Annotated[int | None, typer.Option("--steps", min=1, help="Only the first so many training steps.")]


def command(
    target: Target,
    methods: Annotated[
        str, typer.Option("--methods", metavar="A,B,...", help=f"Of {', '.join(METHODS)}.")
    ] = "mgd,unrolled",
    rounds: show.Rounds = 3,
    steps: Shorter = None,
    core: show.Core = -1,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, in a process for each method.")] = True,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Write a Chrome trace of one metagradient.")
    ] = None,
    out: Out = None,
    json: Json = None,
) -> None:
    """Time of a metagradient of your own training, by phase and in units of plain training; and its plan."""
    from mgd.ui import page as plots

    if out:
        plots.require_matplotlib()
    names = chosen(methods)
    console, where = show.console(), timing.machine()
    case = cases.load(target, steps)
    console.print(timing.describe(where), highlight=False)
    with show.ticking(console) as tick:
        found = throughput.measure(target, names, rounds, steps, case.device, show.core_of(core), memory, tick)
    throughput.display(console, found)
    console.print(f"\n{throughput.CAPTION}", style="dim", highlight=False)
    console.print(f"\n[bold]The plan[/bold]\n{case.function.plan().explain()}", highlight=False)
    if trace:
        case.function.metagradient(case.z, profile=trace)
        console.print(
            f"\nwrote {trace}: open it in chrome://tracing or ui.perfetto.dev", highlight=False, soft_wrap=True
        )
    result = {"machine": where, "plan": case.function.plan().to_dict(), "results": [found]}
    show.finish(console, "profile time", result, json, out, lambda: throughput.page([found], where))
    if not all(entry.get("agrees", True) for entry in found["methods"].values()):
        raise typer.Exit(1)
