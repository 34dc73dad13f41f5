"""`mgd bench kernels`: the fused passes against plain passes over memory and against torch.

Bandwidth is the bytes that a pass must move over its time. The plain passes (a copy, the C library's, an addition in
place) run in alternation with it, and the fastest counts. Times are the least of the rounds: other programs only make
memory slower.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Annotated, Any

import typer

from mgd.bench import figures, show, timing
from mgd.bench.kernel_cases import RULES, Problem, plain
from mgd.ui.options import Json, Out

PASSES = ("step", "vjp", "replay")
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
    found: dict[str, Any] = {
        "parameters": parameters,
        "device": device,
        "rounds": rounds,
        "unavailable": {},
        "rows": [],
    }
    with timing.pinned(core) as pinning:
        found |= pinning
        source, to = torch.rand(parameters, device=device), torch.zeros(parameters, device=device)
        moves = plain(to, source)
        for name in PREFERENCE.get(kind, ("reference",)):
            module, reason = load(name)
            if module is None or name == "reference":
                if name != "reference":
                    found["unavailable"][name] = reason
                continue
            for rule in RULES:
                tick(f"{name}, {rule}: numbers")
                errors = Problem(rule, module, CHECKED, device).errors()
                problem = Problem(rule, module, parameters, device)
                for pass_ in PASSES:
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
                        "pass": pass_ + (f" of {problem.logged} steps" if pass_ == "replay" else ""),
                        "seconds": seconds,
                        "bytes_per_parameter": problem.bytes(pass_),
                        "gigabytes_per_second": moved / 1e9,
                        "plain_gigabytes_per_second": bandwidths,
                        "share_of_plain": moved / 1e9 / best,
                        "error": errors[pass_],
                        "hyperparameter_error": errors["hyperparameters"] if pass_ == "vjp" else None,
                    }
                    if against_torch:
                        row |= _torch(problem, pass_, device)
                        row["times_torch"] = row["torch_seconds"] / seconds
                    row["precise"] = max(row["error"], row["hyperparameter_error"] or 0.0) <= PRECISE
                    found["rows"].append(row)
                del problem
    return found


def _torch(problem: Problem, pass_: str, device: str) -> dict[str, Any]:
    """The same work in torch: autograd for the VJP, torch.optim for the steps."""
    if pass_ == "vjp":
        return {"torch": "autograd", "torch_seconds": timing.least(2, problem.autograd, device=device)[0]}
    seconds = timing.least(2, problem.optim(), device=device)[0]
    steps = problem.logged if pass_ == "replay" else 1
    return {"torch": "torch.optim" + (f", {steps} steps" if steps > 1 else ""), "torch_seconds": steps * seconds}


# --- shown -------------------------------------------------------------------------------------------------------


def rows(found: dict[str, Any]) -> list[list[str]]:
    lines = [["pass", "backend", "ms", "bytes each", "GB/s", "of plain", "times torch", "error"]]
    for row in found["rows"]:
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
    "vjp: the step is computed again inside. error: against float64, the largest of all results, relative in norm."
)

STATIC = "Predictions, not measurements: read off the code that Triton compiles for each architecture, without a GPU; "
STATIC += "milliseconds are bytes over the published bandwidth, for 33.5 million parameters."


def static_rows(table: list[dict[str, Any]]) -> list[list[str]]:
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


def page(found: dict[str, Any], where: dict[str, Any]):
    from mgd.ui import page as plots

    entries = [
        (f"{row['rule']} {row['pass']} ({row['backend']})", row["gigabytes_per_second"], f"{row['share_of_plain']:.0%}")
        for row in found["rows"]
    ]
    best = statistics.median(max(row["plain_gigabytes_per_second"].values()) for row in found["rows"])
    figure = figures.bars("Bandwidth of the fused passes", "GB/s", entries, (best, "plain passes over memory"))
    lead = f"{found['parameters']:,} parameters in float32. {timing.describe(where)}."
    return (
        "Optimizer kernels",
        lead,
        [plots.Section("Bandwidth", CAPTION, figure, "kernels", rows(found))],
    )


def command(
    static: Annotated[
        bool, typer.Option("--static", help="What the GPU kernels compile to: no GPU needed, nothing is timed.")
    ] = False,
    parameters: Annotated[str, typer.Option(help='How many, such as "32M".')] = "32M",
    rounds: show.Rounds = 7,
    device: show.Device = "cpu",
    core: show.Core = -1,
    against_torch: Annotated[bool, typer.Option(help="Time torch too.")] = True,
    out: Out = None,
    json: Json = None,
) -> None:
    """Bandwidth of the optimizer kernels against plain copies, and their time against torch."""
    from mgd.cli.plan import parse_count
    from mgd.errors import BadArgument
    from mgd.ui import page as plots

    console, where = show.console(), timing.machine()
    if static:
        from mgd_kernels import aot

        with show.ticking(console) as tick:
            tick("registers and bytes of the compiled GPU kernels")
            table = aot.static_table()
        show.table(console, "GPU kernels as compiled", static_rows(table), STATIC)
        result = {"machine": where, "basis": STATIC, "rows": table}
        section = plots.Section("As compiled", STATIC, table=static_rows(table))
        show.finish(
            console, "bench kernels --static", result, json, out, lambda: ("GPU kernels as compiled", "", [section])
        )
        return
    if out:
        plots.require_matplotlib()
    try:
        count = parse_count(parameters)
    except ValueError as error:
        raise BadArgument(str(error)) from error
    show.require(device)
    console.print(timing.describe(where), highlight=False)
    with show.ticking(console) as tick:
        found = measure(count, device, rounds, show.core_of(core), against_torch, tick)
    for name, reason in found["unavailable"].items():
        console.print(f"{name} was not measured: {reason}", highlight=False)
    if not found["rows"]:
        raise BadArgument(f"no backend but the reference serves {device}; `mgd doctor` says what is missing")
    show.table(console, f"Optimizer kernels, {count:,} parameters in float32", rows(found), CAPTION)
    show.finish(console, "bench kernels", {"machine": where, **found}, json, out, lambda: page(found, where))
    if not all(row["precise"] for row in found["rows"]):
        raise typer.Exit(1)
