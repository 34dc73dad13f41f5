"""`mgd bench plan`: the seconds that a plan predicts for each phase, against those that the phase takes.

Each metagradient is planned with the costs that the one before it measured, as `f.metagradient` does.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from mgd import Budget, TrainingFunction
from mgd.bench import shared, timing
from mgd.bench.workload import Workload
from mgd.bench.workloads import WORKLOADS
from mgd.errors import BadArgument
from mgd.plan.training import STAGING
from mgd.ui.options import Json, parse_names
from mgd.util.text import format_seconds

AMPLE = 1 << 40  # bytes
WARM = 2  # metagradients that are not counted: the first measures costs, the second is the first planned with them
CLOSE = 0.2  # a prediction is wanted within this share of what was measured


def budgets(workload: Workload, directory: str) -> dict[str, Budget]:
    """Everything in memory; a fourth of that; everything on disk; half of it in memory and the rest on disk."""
    everything = workload.function(budget=Budget(host=AMPLE)).plan()
    buffers = 3 * max(everything.sizes.gradient, STAGING // 3) + 3  # see mgd.plan.training.staging
    held = everything.peak["host"]
    return {
        "memory": Budget(host=AMPLE),
        "little memory": Budget(host=max(held // 4, everything.sizes.snapshot)),
        "disk": Budget(disk=(directory, AMPLE)),
        "both": Budget(host=held // 2 + buffers, disk=(directory, AMPLE)),
    }


def measure(workload: Workload, directory: str | os.PathLike[str], rounds: int, core: int | None) -> dict[str, Any]:
    """By budget, of each phase: predicted and measured seconds (medians), the ratios of predicted to measured
    (quantiles), and what limits it according to the plan. The budgets alternate."""
    z = workload.z()
    with timing.pinned(core) as pinning, tempfile.TemporaryDirectory(dir=directory) as place:
        functions = {name: workload.function(budget=budget) for name, budget in budgets(workload, place).items()}
        reports: dict[str, list[Any]] = {name: [] for name in functions}
        for i in range(WARM + rounds):
            for name, function in functions.items():
                report = _report(function, z)
                if i >= WARM:
                    reports[name].append(report)
        return {
            "workload": workload.name,
            "steps": len(workload.batches),
            **pinning,
            "budgets": {name: _compared(made) for name, made in reports.items()},
        }


def _report(function: TrainingFunction, z: dict[str, Any]) -> Any:
    return function.metagradient(z).report


def _compared(reports: list[Any]) -> dict[str, Any]:
    """What the plans of these metagradients predicted, and what was measured."""
    plan = reports[-1].plan
    phases = {}
    for phase in plan["phases"]:
        name = phase["name"]
        pairs = [(report.predicted_seconds[name], report.measured_seconds.get(name, 0.0)) for report in reports]
        pairs = [pair for pair in pairs if min(pair) > 0]  # plans of several costs need not all have this phase
        if pairs:
            phases[name] = {
                "predicted": median(predicted for predicted, _ in pairs),
                "measured": median(measured for _, measured in pairs),
                "ratio": timing.quantiles([predicted / measured for predicted, measured in pairs]),
                "limited_by": phase["limited_by"],
            }
    return {
        "overlap": plan["costs"]["overlap"],
        "segments": plan["segments"],
        "logged": plan["logged_gradients"],
        "phases": phases,
    }


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    lines = [["training", "budget", "phase", "predicted", "measured", "predicted / measured", "limited by"]]
    for run in results:
        for budget, compared in run["budgets"].items():
            for name, phase in compared["phases"].items():
                lines.append(
                    [
                        f"{run['workload']}, {run['steps']} steps",
                        budget,
                        name,
                        *(format_seconds(phase[key]) for key in ("predicted", "measured")),
                        shared.ratio(phase["ratio"]),
                        phase["limited_by"],
                    ]
                )
    return lines


def close(results: list[dict[str, Any]]) -> tuple[int, int]:
    """Of how many phases the median prediction is `CLOSE`, and of how many phases there are."""
    ratios = [
        phase["ratio"]["median"]
        for run in results
        for compared in run["budgets"].values()
        for phase in compared["phases"].values()
    ]
    return sum(abs(ratio - 1) <= CLOSE for ratio in ratios), len(ratios)


def command(
    workload: Annotated[
        str, typer.Option("--workload", metavar="A,B,...", help=f"One or more of {', '.join(WORKLOADS)}.")
    ] = "small,mlp,gpt",
    steps: Annotated[
        str, typer.Option("--steps", metavar="N,N,...", help="Numbers of training steps, each in turn.")
    ] = "16,64",
    directory: Annotated[
        Path | None,
        typer.Option("--directory", metavar="DIR", help="A folder on the disk to use. Default: for temporary files."),
    ] = None,
    rounds: shared.Rounds = 3,
    core: shared.Core = -1,
    json: Json = None,
) -> None:
    """Predicted against measured seconds of each phase, with log and snapshots in memory, on disk and on both."""
    names = parse_names(workload, WORKLOADS, "workloads")
    counts = _counts(steps)
    place = directory or Path(tempfile.gettempdir())
    if not place.is_dir():
        raise BadArgument(f"expected a directory; got {str(place)!r}")
    session, where = shared.begin("bench plan", None, json)
    results = []
    with session.status() as tick:
        for name in names:
            for count in counts:
                tick(f"{name}, {count} steps")
                results.append(measure(WORKLOADS[name](steps=count), place, rounds, shared.core_of(core)))
    good, phases = close(results)
    text = (
        f"Medians of {rounds}; the ratio with its 20% and 80% quantiles. {good} of {phases} phases are predicted "
        f"within {CLOSE:.0%}. On a CPU, only the disk's transfers run beside the computation. Copies in memory, and "
        "those to and from the disk's buffers, are part of it."
    )
    session.table("Predicted and measured seconds", rows(results), text)
    session.write(None, {"machine": where, "directory": str(place), "close": [good, phases], "runs": results})


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) >= 2 for part in parts):
        raise BadArgument(f"expected numbers of steps, each at least 2, such as 16,64; got {text!r}")
    return [int(part) for part in parts]
