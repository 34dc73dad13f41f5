"""`mgd bench throughput`: metagradients by every method, in units of plain eager training of the same steps.

One thread on one core. In each round a method runs between two plain trainings, and its ratio is to their mean; every
method runs once before anything is timed, and these first results must agree. How long that first call takes, captures
and compilation included, is told apart. Peak memory comes from a fresh process for each method (`mgd.bench.peak`).

Workloads of the package are timed by the time that the process computes: none but bergson waits for a disk, and what
else runs on the machine counts less. A GPU, and a training of the user's, are timed by the clock on the wall.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from mgd.bench import figures, peak, shared, timing
from mgd.bench.baselines import Unsupported
from mgd.bench.cases import Case, load
from mgd.bench.methods import DEFAULT, METHODS, Outcome, difference_along, differences, training
from mgd.bench.workloads import WORKLOADS
from mgd.results import Report
from mgd.ui import machine
from mgd.ui.console import Session
from mgd.ui.options import Device, Json, Out, parse_names
from mgd.ui.page import Page, Section, Table
from mgd.util.devices import checked_device

# Of float32 metagradients by two methods that round differently, measured: 1e-7 to 1e-5 after a few steps. AdamW with
# a small eps_root magnifies rounding with the length of the training; a wrong term would show as 1e-1 or more.
AGREE = 1e-2


def measure(
    source: str,
    methods: Sequence[str] = DEFAULT,
    rounds: int = 5,
    steps: int | None = None,
    device: str = "cpu",
    core: int | None = -1,
    memory: bool = True,
    tick: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times, ratios, phases, memory and differences of the methods on one case, in JSON's types."""
    with timing.pinned(core) as pinning:
        case = load(source, steps, device)
        clock = time.process_time if source in WORKLOADS and device == "cpu" else time.perf_counter
        measured: dict[str, Any] = {
            "case": source,
            "note": case.note,
            "steps": len(case),
            "parameters": sum(p.numel() for p in case.function.model.parameters() if p.requires_grad),
            "device": device,
            "clock": clock.__name__,
            **pinning,
            "methods": {},
        }
        lengths = _lengths(case, methods, measured["methods"], memory, tick)
        reference: Outcome | None = None
        for length in sorted(set(lengths.values()), reverse=True):
            part = case.shortened(length)
            train, measured["training_by"] = training(part)
            train()
            reference = METHODS["eager"].prepare(part)()
            runs: dict[str, Callable[[], Any]] = {}
            reports: dict[str, Report] = {}
            for name in (name for name, needed in lengths.items() if needed == length):
                tick(f"{source}, {name}: first call")
                try:
                    run = METHODS[name].prepare(part)
                    start = time.perf_counter()
                    outcome = run()
                    first = time.perf_counter() - start
                except Unsupported as reason:
                    measured["methods"][name] = {"what": METHODS[name].what, "unsupported": str(reason)}
                    continue
                runs[name] = _noting(run, name, reports)
                measured["methods"].setdefault(name, {}).update(
                    _described(name, outcome, reference, length) | {"first_seconds": first}
                )
            trainings, samples = timing.alternate(
                rounds, train, runs, device, lambda what: tick(f"{source}, {what}"), clock
            )
            if length == len(case):
                measured["training"] = {"seconds": timing.quantiles(trainings)}
            for name, sample in samples.items():
                _timed(measured["methods"][name], sample, METHODS[name].objectives, reports.get(name))
        if "training" not in measured:  # every method was shortened
            whole = training(case)[0]
            measured["training"] = {
                "seconds": timing.quantiles([timing.seconds_of(whole, device, clock) for _ in range(2)])
            }
    if memory:
        tick(f"{source}, memory: training")
        measured["training"]["peak_bytes"] = peak.measure(source, "training", steps, device)["bytes"]
        for name, entry in measured["methods"].items():
            if "peak_bytes" not in entry and "unsupported" not in entry:
                tick(f"{source}, memory: {name}")
                shortened = lengths[name] if METHODS[name].share < 1 else steps
                entry["peak_bytes"] = peak.measure(source, name, shortened, device)["bytes"]
    measured["methods"] = {name: measured["methods"][name] for name in methods if name in measured["methods"]}
    return measured


def _lengths(
    case: Case, methods: Sequence[str], entries: dict[str, Any], memory: bool, tick: Callable[[str], None]
) -> dict[str, int]:
    """How many steps of each method are run: all of them, but for those that are too long or do not fit in memory."""
    lengths = {}
    for name in methods:
        lengths[name] = min(len(case), max(2, round(len(case) * METHODS[name].share)))
        if name == "unrolled" and memory and len(case) > peak.PROBES[1]:
            tick(f"{case.source}, memory: unrolled")
            try:
                probe = peak.extrapolated(case.source, name, len(case), case.device)
            except peak.Failed:
                continue  # the reason shows when it is run
            if probe["fits_steps"] < len(case):
                lengths[name] = probe["fits_steps"]
                entries[name] = {"peak_bytes": probe["bytes"], "peak_extrapolated_from": probe["from_steps"]}
    return lengths


def _described(name: str, outcome: Outcome, reference: Outcome, length: int) -> dict[str, Any]:
    if outcome.along is None:
        differing = differences(outcome.grads, reference.grads)
    else:
        differing = difference_along(outcome, reference.grads)
    return {
        "what": METHODS[name].what,
        "ours": METHODS[name].ours,
        "objectives": METHODS[name].objectives,
        "timed_steps": length,
        "difference": differing,
        "agrees": all(value <= AGREE for value in differing.values()),
    }


def _noting(run: Callable[[], Outcome], name: str, reports: dict[str, Report]) -> Callable[[], None]:
    """The run without its gradients, which would take memory from the next; its report is kept."""

    def noting() -> None:
        report = run().report
        if report is not None:
            reports[name] = report

    return noting


def _timed(entry: dict[str, Any], sample: timing.Samples, objectives: int, report: Report | None) -> None:
    summary = sample.summary()
    if report is not None:
        told = ("schedule", "peak", "limits", "model_steps", "update_steps")  # forward mode has no schedule
        entry["plan"] = {key: report.plan[key] for key in told if key in report.plan}
        entry |= {"phases": report.seconds, "execution": report.execution}
    entry |= summary
    entry["ratio"] = {key: value / objectives for key, value in summary["ratio"].items()}
    entry["steps_per_second"] = entry["timed_steps"] / summary["seconds"]["median"]


# --- shown -------------------------------------------------------------------------------------------------------


def rows(measured: dict[str, Any]) -> Table:
    alone = measured["training"]
    seconds = alone["seconds"]["median"]
    lines = [["method", "seconds", "first call", "trainings (20% - 80%)", "steps/s", "peak memory", "difference"]]
    lines.append(
        [
            "plain training",
            f"{seconds:.2f}",
            "",
            "1",
            f"{measured['steps'] / seconds:.1f}",
            shared.memory(alone.get("peak_bytes")),
            "",
        ]
    )
    for name, entry in measured["methods"].items():
        if "unsupported" in entry:
            lines.append([name, *6 * ["-"]])
            continue
        short = entry["timed_steps"] < measured["steps"]
        lines.append(
            [
                name + (f" ({entry['timed_steps']} steps)" if short else ""),
                f"{entry['seconds']['median']:.2f}",
                f"{entry['first_seconds']:.2f}",
                shared.ratio(entry["ratio"]),
                f"{entry['steps_per_second']:.1f}",
                shared.memory(entry.get("peak_bytes"), "peak_extrapolated_from" in entry),
                f"{max(entry['difference'].values(), default=0.0):.0e}" + ("" if entry["agrees"] else " DISAGREES"),
            ]
        )
    return lines


def phase_rows(measured: dict[str, Any]) -> Table:
    """Shares of each phase of this package's methods."""
    ours = {name: e["phases"] for name, e in measured["methods"].items() if e.get("phases")}
    phases = list(dict.fromkeys(phase for seconds in ours.values() for phase in seconds))
    lines = [["where the time goes", *phases]]
    for name, seconds in ours.items():
        total = sum(seconds.values())
        lines.append([name, *(f"{seconds.get(phase, 0.0) / total:.0%}" for phase in phases)])
    return lines


CAPTION = (
    "trainings: time over that of plain eager training of the same steps (torch.optim, backward), measured beside it; "
    "the metagradient includes its own training. first call: its seconds on the wall, which are in no median. "
    "peak memory: growth of a fresh process, ~ where extrapolated from short trainings because it would not fit. "
    "difference: from mgd eager, the largest of all metaparameters."
)


def title(measured: dict[str, Any]) -> str:
    return f"{measured['case']}: {measured['steps']} steps, {measured['parameters']:,} trained parameters"


def display(session: Session, measured: dict[str, Any]) -> None:
    session.table(title(measured), rows(measured), measured["note"])
    if len(split := phase_rows(measured)) > 1:
        session.table("", split)
    if "own training" in measured["training_by"]:
        session.print(f"Plain training is {measured['training_by']}.")
    for name, entry in measured["methods"].items():
        if "unsupported" in entry:
            session.print(f"{name} was left out: {entry['unsupported']}.")


def page(results: list[dict[str, Any]], where: dict[str, Any]) -> Page:
    lead = f"One thread. {machine.describe(where)}. " + " ".join(
        f"{name}: {METHODS[name].what}." for name in METHODS if any(name in r["methods"] for r in results)
    )

    def sections() -> list[Section]:
        return [
            Section("Time and memory", CAPTION, figures.throughput(results), "throughput"),
            Section("Where the time goes", "Phases of this package's methods.", figures.phases(results), "phases"),
            *(Section(title(measured), measured["note"], table=rows(measured)) for measured in results),
        ]

    return Page("What a metagradient costs", lead, sections=sections)


def disagreeing(results: list[dict[str, Any]]) -> list[str]:
    """Which methods, on which case, gave other gradients."""
    return [
        f"{name} on {measured['case']}"
        for measured in results
        for name, entry in measured["methods"].items()
        if not entry.get("agrees", True)
    ]


def command(
    workload: Annotated[
        str, typer.Option("--workload", metavar="A,B,...", help=f"One or more of {', '.join(WORKLOADS)}.")
    ] = "mlp,gpt,convnet-group,convnet-batch",
    methods: Annotated[
        str, typer.Option("--methods", metavar="A,B,...", help=f"One or more of {', '.join(METHODS)}.")
    ] = ",".join(DEFAULT),
    rounds: shared.Rounds = 5,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Number of training steps. Default: the workload's own.")
    ] = None,
    device: Device = "cpu",
    core: shared.Core = -1,
    memory: shared.Memory = True,
    out: Out = None,
    json: Json = None,
) -> None:
    """Time and memory of a metagradient by every method, in units of plain training of the same steps."""
    names, sources = parse_names(methods, METHODS, "methods"), parse_names(workload, WORKLOADS, "workloads")
    checked_device(device)
    session, where = shared.begin("bench throughput", out, json)
    results = []
    for source in sources:
        with session.status() as tick:
            results.append(measure(source, names, rounds, steps, device, shared.core_of(core), memory, tick))
        display(session, results[-1])
    session.print(f"\n{CAPTION}", style="dim")
    session.write(page(results, where), {"machine": where, "agree_within": AGREE, "results": results})
    if wrong := disagreeing(results):
        session.print(f"The gradients of {', '.join(wrong)} differ from those of mgd eager.", style="bold red")
        raise typer.Exit(1)
