"""`mgd bench memory`: peak memory and time of one metagradient against the length of the training.

Every point is a fresh process on one pinned core, which makes one call; its memory is the growth of the process
during that call. Short trainings are called again, in alternation with plain training, for their time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from mgd.bench import figures, peak, shared
from mgd.errors import BadArgument
from mgd.ui import machine
from mgd.ui.console import Session
from mgd.ui.options import Json, Out
from mgd.ui.page import Page, Section, Table
from mgd.util.text import format_bytes, parse_bytes

LENGTHS = (16, 64, 256, 1024, 4096)
BUDGETS = ("4MB", "32MB", "256MB")
UNROLLED = 256  # steps beyond which the unrolled graph is extrapolated
REPEATED = 256  # steps up to which calls are repeated; beyond, the one call lasts long enough
# Of the gradients' norms by plain torch and by this package, as in `throughput.AGREE`.
AGREE = 1e-2


def methods(budgets: Sequence[str] = BUDGETS) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> arguments of `peak.measure`: the method and its options."""
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "torch unrolled": ("unrolled", {}),
        "torch all states": ("states", {}),
        "mgd all states": ("package", {"schedule": "all"}),
        "mgd sqrt": ("package", {"schedule": "sqrt"}),
        "mgd k-ary, k = 8": ("package", {"schedule": "kary:8"}),
    }
    for budget in budgets:
        options = {"schedule": "auto", "budget": {"host": parse_bytes(budget)}}
        found[f"mgd auto, {format_bytes(parse_bytes(budget))}"] = ("package", options)
    return found


def measure(
    source: str = "small",
    lengths: Sequence[int] = LENGTHS,
    compared: Mapping[str, tuple[str, dict[str, Any]]] | None = None,
    unrolled: int = UNROLLED,
    core: int | None = -1,
    tick: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Points `{steps, peak_bytes, seconds, ratio, extrapolated}` of every method, in JSON's types.

    compared: as `methods` gives them. unrolled: steps beyond which plain torch's unrolled graph is extrapolated.
    """
    lengths = sorted(set(lengths))
    training: dict[int, dict[str, Any]] = {}
    for steps in lengths:
        tick(f"plain training, {steps} steps")
        training[steps] = peak.measure(source, "training", steps, core=core)
    found: dict[str, Any] = {"case": source, "steps": lengths, "core": core, "methods": {}}
    found["training"] = [{"steps": t, "peak_bytes": p["bytes"], "seconds": p["seconds"]} for t, p in training.items()]
    digests: dict[int, set[str]] = {}
    norms: dict[int, dict[str, dict[str, float]]] = {}
    for name, (method, options) in (methods() if compared is None else compared).items():
        points = found["methods"].setdefault(name, [])
        for steps in lengths:
            measured = [p for p in points if not p["extrapolated"]]
            if method == "unrolled" and steps > unrolled and len(measured) >= 2:
                points.append(_extrapolated(measured, steps, training[steps]["seconds"]))
                continue
            tick(f"{name}, {steps} steps")
            rounds = 3 if steps <= REPEATED else 0
            try:
                result = peak.measure(source, method, steps, options=options, rounds=rounds, core=core)
            except peak.Failed as error:  # a budget too small for this length, or no memory
                points.append({"steps": steps, "failed": str(error), "extrapolated": False})
                continue
            points.append(_point(steps, result, training[steps]["seconds"]))
            norms.setdefault(steps, {})[name] = result["norms"]
            if method == "package":
                digests.setdefault(steps, set()).add(result["digest"])
    found["bit_identical"] = all(len(same) == 1 for same in digests.values())
    found["agree"] = all(_agree(each) for each in norms.values())
    return found


def _point(steps: int, result: Mapping[str, Any], training: float) -> dict[str, Any]:
    point = {"steps": steps, "peak_bytes": result["bytes"], "extrapolated": False}
    if "timing" in result:
        point |= {name: result["timing"][name]["median"] for name in ("seconds", "ratio")}
    else:
        point |= {"seconds": result["seconds"], "ratio": result["seconds"] / training}
    if result["report"]:
        plan = result["report"]["plan"]
        point["stored_bytes"] = sum(plan["peak"].values())
        point["model_steps"] = plan["model_steps"]
    return point


def _extrapolated(measured: list[dict[str, Any]], steps: int, training: float) -> dict[str, Any]:
    values = {key: peak.line([(p["steps"], p[key]) for p in measured], steps) for key in ("peak_bytes", "seconds")}
    return {"steps": steps, "extrapolated": True, **values, "ratio": values["seconds"] / training}


def _agree(norms: Mapping[str, Mapping[str, float]]) -> bool:
    first, *rest = norms.values()
    return all(abs(other[key] - first[key]) <= AGREE * abs(first[key]) for other in rest for key in first)


# --- shown -------------------------------------------------------------------------------------------------------


def rows(found: dict[str, Any], cell: Callable[[dict[str, Any]], str], training: str = "") -> Table:
    lines = [["", *(f"T = {steps:,}" for steps in found["steps"])]]
    if training:
        lines.append([training, *(cell({**p, "extrapolated": False, "ratio": 1.0}) for p in found["training"])])
    for name, points in found["methods"].items():
        lines.append([name, *("see below" if "failed" in point else cell(point) for point in points)])
    return lines


def memory_cell(point: dict[str, Any]) -> str:
    return shared.memory(point["peak_bytes"], point["extrapolated"])


def time_cell(point: dict[str, Any]) -> str:
    return f"{'~' if point['extrapolated'] else ''}{point['seconds']:.2f} s ({point['ratio']:.1f})"


CAPTION = (
    "Every number comes from a process of its own. Memory: growth during the call, above the loaded model and data. "
    "In brackets: time over that of plain training of the same steps. ~: extrapolated along a straight line."
)


def display(session: Session, measured: dict[str, Any]) -> None:
    source = measured["case"]
    session.table(f"Peak memory of one metagradient, {source}", rows(measured, memory_cell, "plain training"))
    session.table("Its time", rows(measured, time_cell, "plain training"), CAPTION)
    for name, points in measured["methods"].items():
        for point in points:
            if "failed" in point:
                session.print(f"{name}, {point['steps']} steps: {point['failed']}")
    if not measured["bit_identical"]:
        session.print("Plans of this package did NOT give the same bits at every length.", style="bold red")
    if not measured["agree"]:
        session.print("The gradients of the methods differ by more than rounding.", style="bold red")


def page(measured: dict[str, Any], where: dict[str, Any]) -> Page:
    checked = "gave the same bits" if measured["bit_identical"] else "did NOT give the same bits"
    lead = (
        f"How memory and time of one metagradient grow with the length of the training ({measured['case']}). One "
        f"thread. {machine.describe(where)}. All plans of this package {checked} at every length."
    )

    def sections() -> list[Section]:
        return [
            Section("Memory and time", CAPTION, figures.memory(measured), "memory"),
            Section("Peak memory", table=rows(measured, memory_cell, "plain training")),
            Section("Time", table=rows(measured, time_cell, "plain training")),
        ]

    return Page("Memory of a metagradient", lead, sections=sections)


def finish(session: Session, measured: dict[str, Any], where: dict[str, Any]) -> None:
    """Write the results; a failure of the command where methods disagree."""
    session.write(page(measured, where), {"machine": where, **measured})
    if not (measured["bit_identical"] and measured["agree"]):
        raise typer.Exit(1)


def command(
    workload: Annotated[str, typer.Option("--workload", help="A workload, or SCRIPT.py:FUNCTION.")] = "small",
    steps: Annotated[
        str, typer.Option("--steps", metavar="T,T,...", help="Lengths of the training, in steps.")
    ] = ",".join(map(str, LENGTHS)),
    budgets: Annotated[
        str,
        typer.Option(
            "--budgets", metavar="SIZE,...", help="Budgets of host memory; each is planned with the schedule auto."
        ),
    ] = ",".join(BUDGETS),
    core: shared.Core = -1,
    out: Out = None,
    json: Json = None,
) -> None:
    """Peak memory and time of a metagradient against the number of training steps."""
    words = steps.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise BadArgument(f'expected numbers of training steps such as "16,64"; got {steps!r}')
    try:
        compared = methods(budgets.split(","))
    except ValueError as error:
        raise BadArgument(str(error)) from error
    session, where = shared.begin("bench memory", out, json)
    with session.status() as tick:
        measured = measure(workload, [int(word) for word in words], compared, core=shared.core_of(core), tick=tick)
    display(session, measured)
    finish(session, measured, where)
