"""`mgd bench kernels`: the fused passes against plain passes over memory and against torch.

Bandwidth is the bytes that a pass must move over its time. The plain passes (a copy, the C library's, an addition in
place) run in alternation with it, and the fastest counts. Times are the least of the rounds: other programs only make
memory slower.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mgd.bench import figures, shared, timing
from mgd.bench.kernel_cases import RULES, VJPS, Problem, plain
from mgd.errors import BadArgument
from mgd.ui import machine
from mgd.ui.console import Session
from mgd.ui.options import Device, Json, Out, parse_count
from mgd.ui.page import Page, Section, Table
from mgd.util.devices import checked_device

PASSES = ("step", *VJPS, "replay", "jvp")
NAMES = {
    "vjp": "vjp",
    "vjp_rates": "vjp, rates",
    "vjp_none": "vjp, none",
    "jvp": "step and jvp",
}
CHECKED = 1 << 16  # parameters of the problem on which results are compared with float64
# In norm. A float32 result of a few operations rounds by some 1e-7; sums over 65,536 parameters are made in double.
PRECISE = 2e-6


def measure(
    parameters: int = 32 << 20,
    device: str = "cpu",
    rounds: int = 7,
    core: int | None = -1,
    against_torch: bool = True,
    tick: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Rows of `{backend, rule, pass, gigabytes_per_second, share_of_plain, times_torch, error}`."""
    import torch

    from mgd_kernels.dispatch import PREFERENCE, load

    kind = torch.device(device).type
    measured: dict[str, Any] = {
        "parameters": parameters,
        "device": device,
        "rounds": rounds,
        "unavailable": {},
        "rows": [],
    }
    with timing.pinned(core) as pinning:
        measured |= pinning
        source, to = torch.rand(parameters, device=device), torch.zeros(parameters, device=device)
        moves = plain(to, source)
        for name in PREFERENCE.get(kind, ("reference",)):
            module, reason = load(name)
            if module is None or name == "reference":
                if name != "reference":
                    measured["unavailable"][name] = reason
                continue
            for rule in RULES:
                tick(f"{name}, {rule}: numbers")
                errors = Problem(rule, module, CHECKED, device).errors()
                problem = Problem(rule, module, parameters, device)
                for pass_ in PASSES:
                    if pass_ not in errors:
                        continue
                    tick(f"{name}, {rule} {pass_}")
                    run = getattr(problem, pass_)
                    run()
                    seconds, *others = timing.least(rounds, run, *(move for move, _ in moves.values()), device=device)
                    sizes = [size for _, size in moves.values()]
                    bandwidths = {
                        move: size * parameters / other / 1e9
                        for move, size, other in zip(moves, sizes, others, strict=True)
                    }
                    best = max(bandwidths.values())
                    moved = problem.bytes(pass_) * parameters / seconds
                    row: dict[str, Any] = {
                        "backend": name,
                        "rule": rule,
                        "pass": NAMES.get(pass_, pass_) + (f" of {problem.logged} steps" if pass_ == "replay" else ""),
                        "seconds": seconds,
                        "bytes_per_parameter": problem.bytes(pass_),
                        "gigabytes_per_second": moved / 1e9,
                        "plain_gigabytes_per_second": bandwidths,
                        "share_of_plain": moved / 1e9 / best,
                        "error": errors[pass_],
                        "hyperparameter_error": errors.get(f"{pass_}, hyperparameters"),
                    }
                    if against_torch:
                        row |= _torch(problem, pass_, device)
                        row["times_torch"] = row["torch_seconds"] / seconds
                    row["precise"] = max(row["error"], row["hyperparameter_error"] or 0.0) <= PRECISE
                    measured["rows"].append(row)
                del problem
    return measured


def _torch(problem: Problem, pass_: str, device: str) -> dict[str, Any]:
    """The same work in torch: autograd for the VJP, torch.optim for the steps, the specification for the JVP."""
    if pass_ == "jvp":
        from mgd_kernels.backends import reference

        seconds = timing.least(2, lambda: problem.jvp(reference), device=device)[0]
        return {"torch": "torch, in strips", "torch_seconds": seconds}
    if pass_ in VJPS:
        return {"torch": "autograd", "torch_seconds": timing.least(2, problem.autograd, device=device)[0]}
    seconds = timing.least(2, problem.optim(), device=device)[0]
    steps = problem.logged if pass_ == "replay" else 1
    return {"torch": "torch.optim" + (f", {steps} steps" if steps > 1 else ""), "torch_seconds": steps * seconds}


# --- shown -------------------------------------------------------------------------------------------------------


def rows(measured: dict[str, Any]) -> Table:
    lines = [["pass", "backend", "ms", "bytes each", "GB/s", "of plain", "times torch", "error"]]
    for row in measured["rows"]:
        against = f"{row['times_torch']:.1f} x {row['torch']}" if "times_torch" in row else ""
        lines.append(
            [
                f"{row['rule']} {row['pass']}",
                row["backend"],
                f"{1e3 * row['seconds']:.2f}",
                str(row["bytes_per_parameter"]),
                f"{row['gigabytes_per_second']:.2f}",
                f"{row['share_of_plain']:.0%}",
                against,
                f"{row['error']:.0e}" + ("" if row["precise"] else " WRONG"),
            ]
        )
    return lines


CAPTION = (
    "GB/s: bytes that must be moved over the time. of plain: of the best bandwidth of a copy, memcpy and an addition "
    "in place, measured in between. "
    "vjp: the step is computed again inside; of all hyperparameters, of learning rate and weight decay, or of none. "
    "jvp: along one direction. error: against float64, the largest of all results, relative in norm."
)

STATIC = (
    "Predictions, not measurements: read off the code that Triton compiles for each architecture, without a GPU; "
    "milliseconds are bytes over the published bandwidth, for 33.5 million parameters."
)


def static_rows(table: list[dict[str, Any]]) -> Table:
    head = ["kernel", "gradient", "target", "registers", "spills", "occupancy", "bytes each", "predicted ms"]
    lines = [head]
    for row in table:
        predicted = ", ".join(f"{name} {ms:.2f}" for name, ms in row["predicted_ms"].items())
        lines.append(
            [
                row["kernel"],
                row["gradient"],
                row["target"],
                str(row["registers"]),
                str(row["spills"]),
                f"{row['occupancy']:.0%}",
                f"{row['bytes_per_parameter']:.0f}",
                predicted or "-",
            ]
        )
    return lines


def page(measured: dict[str, Any], where: dict[str, Any]) -> Page:
    def sections() -> list[Section]:
        entries = [
            (
                f"{row['rule']} {row['pass']} ({row['backend']})",
                row["gigabytes_per_second"],
                f"{row['share_of_plain']:.0%}",
            )
            for row in measured["rows"]
        ]
        best = statistics.median(max(row["plain_gigabytes_per_second"].values()) for row in measured["rows"])
        line = (best, "plain passes over memory")
        figure = figures.bars("Bandwidth of the fused passes", "GB/s", entries, line)
        return [Section("Bandwidth", CAPTION, figure, "kernels", rows(measured))]

    lead = f"{measured['parameters']:,} parameters in float32. {machine.describe(where)}."
    return Page("Optimizer kernels", lead, sections=sections)


def _as_compiled(out: Path | None, json: Path | None) -> None:
    """What the GPU kernels compile to."""
    from mgd_kernels import aot

    session, where = Session("bench kernels --static", out, json), machine.conditions()
    with session.status() as tick:
        tick("registers and bytes of the compiled GPU kernels")
        compiled = aot.static_table()
    title, table = "GPU kernels as compiled", static_rows(compiled)
    session.table(title, table, STATIC)
    page = Page(title, "", sections=lambda: [Section("As compiled", STATIC, table=table)])
    session.write(page, {"machine": where, "basis": STATIC, "rows": compiled})


def command(
    static: Annotated[
        bool, typer.Option("--static", help="Show what the GPU kernels compile to. Needs no GPU, and times nothing.")
    ] = False,
    parameters: Annotated[str, typer.Option(help='Number of parameters, such as "32M".')] = "32M",
    rounds: shared.Rounds = 7,
    device: Device = "cpu",
    core: shared.Core = -1,
    against_torch: Annotated[bool, typer.Option(help="Time torch as well.")] = True,
    out: Out = None,
    json: Json = None,
) -> None:
    """Bandwidth of the optimizer kernels against plain copies, and their time against torch."""
    if static:
        _as_compiled(out, json)
        return
    count = parse_count(parameters)
    checked_device(device)
    session, where = shared.begin("bench kernels", out, json)
    with session.status() as tick:
        measured = measure(count, device, rounds, shared.core_of(core), against_torch, tick)
    for name, reason in measured["unavailable"].items():
        session.print(f"{name} was not measured: {reason}")
    if not measured["rows"]:
        raise BadArgument(f"no backend but the reference serves {device}; `mgd doctor` says what is missing")
    session.table(f"Optimizer kernels, {count:,} parameters in float32", rows(measured), CAPTION)
    session.write(page(measured, where), {"machine": where, **measured})
    if not all(row["precise"] for row in measured["rows"]):
        raise typer.Exit(1)
