"""`mgd bench offload`: the state store against raw direct I/O, and what a log on disk costs a metagradient."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from mgd.bench import figures, offload_sweep, show, store_io, timing
from mgd.bench.workloads import WORKLOADS
from mgd.ui.options import Json, Out
from mgd.util.text import format_bytes

ROOM = 4 << 30  # bytes of disk that the measurements use at most


def store_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    head = [
        "one entry",
        "write, raw",
        "store",
        "share",
        "read, raw",
        "store",
        "share",
        "put, ms",
        "get, ms",
        "raw read, ms",
    ]
    lines = [head]
    for r in results:
        lines.append(
            [
                format_bytes(r["size"]),
                *(
                    cell
                    for way in ("write", "read")
                    for cell in (f"{r['raw_' + way] / 1e9:.2f}", f"{r[way] / 1e9:.2f}", f"{r[way + '_ratio']:.0%}")
                ),
                *(f"{1e3 * r[key]:.2f}" for key in ("put_call", "get_call", "raw_read_call")),
            ]
        )
    return lines


STORE = (
    "GB/s. Raw: the better of two ways to move the same files with nothing but direct I/O. put, get: one call on an "
    "idle store; put returns when the copy is made, and a thread writes it."
)


def sweep_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    lines = [["", "sweep", "in memory, s", "on disk, s", "slower by", "its thread by", "promise"]]
    for found in results:
        for i, (sweep, promised) in enumerate(found["promised"].items()):
            wall = found["ratios"][f"{sweep} wall"]
            lines.append(
                [
                    f"{found['workload']}, snapshots {place_of(found)}" if i == 0 else "",
                    sweep,
                    f"{found['seconds']['memory'][f'{sweep} wall']['median']:.3f}",
                    f"{found['seconds']['disk'][f'{sweep} wall']['median']:.3f}",
                    f"{_percent(wall['median'])} ({_percent(wall['q20'])}, {_percent(wall['q80'])})",
                    _percent(found["ratios"][f"{sweep} thread"]["median"]),
                    f"{_percent(promised)} {verdict(found, sweep)}",
                ]
            )
    return lines


def conditions(found: dict[str, Any]) -> str:
    """Whether the promise is made for this training."""
    step, write = 1e3 * found["step_seconds"], 1e3 * found["write_seconds"]
    applies = "the promise applies" if step >= write else "the promise does not apply"
    return (
        f"{found['workload']}: {found['steps']} steps of {step:.2f} ms; the write of a gradient "
        f"({format_bytes(found['gradient_bytes'])}) takes {write:.2f} ms, so {applies}. Snapshots lie "
        f"{place_of(found)}, {found['log_on_disk']} gradients on disk; the store's threads run "
        + ("on other cores." if found["apart"] else "on the core of the computation.")
    )


def place_of(found: dict[str, Any]) -> str:
    """Where a sweep had its snapshots, for people."""
    return "in memory" if found["snapshots_in"] == "memory" else "on disk"


def verdict(found: dict[str, Any], sweep: str) -> str:
    """Whether the promise holds; it is made where a step takes as long as the write of its gradient."""
    if found["step_seconds"] < found["write_seconds"]:
        return "does not apply"
    return "held" if found["ratios"][f"{sweep} wall"]["median"] <= found["promised"][sweep] else "missed"


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.0f}%"


SWEEP = (
    "The whole log on disk, against everything in memory, in alternation. slower by: median (20%, 80%) of wall time; "
    "its thread: CPU time of the computing thread alone, to judge by where others use the machine. "
    "The promise is made where a step takes at least as long as the write."
)


def page(stores: list[dict[str, Any]], sweeps: list[dict[str, Any]], where: dict[str, Any]):
    from mgd.ui import page as plots

    entries = [
        (f"{way} {format_bytes(r['size'])}", 100 * r[f"{way}_ratio"], f"{r[way] / 1e9:.2f} GB/s")
        for r in stores
        for way in ("write", "read")
    ]
    sections = []
    if stores:
        picture = figures.bars("The store's bandwidth", "% of raw direct I/O", entries, (100, "raw"))
        sections.append(plots.Section("Store", STORE, picture, "store", store_rows(stores)))
    if sweeps:
        slow = [
            (
                f"{f['workload']}, snapshots {place_of(f)}, {sweep}",
                100 * f["ratios"][f"{sweep} wall"]["median"] - 100,
                verdict(f, sweep),
            )
            for f in sweeps
            for sweep in f["promised"]
        ]
        picture = figures.bars("What a log on disk costs", "% more time than in memory", slow)
        sections.append(
            plots.Section(
                "Both sweeps", "\n\n".join([SWEEP, *map(conditions, sweeps)]), picture, "offload", sweep_rows(sweeps)
            )
        )
    return "Log and snapshots on disk", timing.describe(where), sections


def command(
    directory: Annotated[
        Path | None,
        typer.Option("--directory", metavar="DIR", help="On the disk to measure. [default: for temporary files]"),
    ] = None,
    workload: Annotated[
        str, typer.Option("--workload", metavar="A,B,...", help=f"Of {', '.join(WORKLOADS)}; none: the store alone.")
    ] = "mlp,gpt",
    steps: Annotated[int, typer.Option("--steps", min=2, help="Training steps.")] = 48,
    sizes: Annotated[
        str, typer.Option("--sizes", metavar="A,B,...", help=f"Of {', '.join(store_io.SIZES)}; none: the sweeps alone.")
    ] = ",".join(store_io.SIZES),
    snapshots: Annotated[
        str, typer.Option("--snapshots", metavar="A,B", help="Where they lie: disk, memory, or both.")
    ] = "disk,memory",
    apart: Annotated[
        bool, typer.Option("--apart", help="The store's threads on other cores than the computation.")
    ] = False,
    rounds: show.Rounds = 7,
    core: show.Core = -1,
    out: Out = None,
    json: Json = None,
) -> None:
    """The state store against raw direct I/O, and what a log on disk costs a metagradient."""
    from mgd.errors import BadArgument
    from mgd.ui import page as plots

    if out:
        plots.require_matplotlib()
    wanted = [] if sizes == "none" else [size.strip() for size in sizes.split(",")]
    sources = [] if workload == "none" else [name.strip() for name in workload.split(",")]
    placements = [name.strip() for name in snapshots.split(",")]
    for given, known in ((wanted, store_io.SIZES), (sources, WORKLOADS), (placements, offload_sweep.SNAPSHOTS)):
        if unknown := [name for name in given if name not in known]:
            raise BadArgument(f"expected some of {', '.join(known)}; got {', '.join(unknown)}")
    place = directory or Path(tempfile.gettempdir())
    if not place.is_dir():
        raise BadArgument(f"expected a directory; {place} is none")
    if (free := shutil.disk_usage(place).free) < ROOM:
        raise BadArgument(f"expected {format_bytes(ROOM)} of free disk at {place}; there are {format_bytes(free)}")
    console, where = show.console(), timing.machine()
    console.print(timing.describe(where), highlight=False)
    stores, sweeps = [], []
    with show.ticking(console) as tick:
        for size in wanted:
            tick(f"the store, entries of {size}")
            with timing.pinned(None):  # raw and store have threads of their own
                stores.append(store_io.measure(place, store_io.SIZES[size]))
        for name in sources:
            for placement in placements:
                tick(f"{name}, log on disk and in memory, snapshots: {placement}")
                made, on = WORKLOADS[name](steps=steps), show.core_of(core)
                sweeps.append(offload_sweep.measure(made, place, rounds, on, placement, apart))
    if stores:
        show.table(console, f"The store at {place}, {stores[0]['io']} I/O", store_rows(stores), STORE)
    if sweeps:
        show.table(console, "A log on disk", sweep_rows(sweeps), SWEEP)
        for found in sweeps:
            console.print(conditions(found), highlight=False)
    result = {"machine": where, "directory": str(place), "store": stores, "sweeps": sweeps}
    show.finish(console, "bench offload", result, json, out, lambda: page(stores, sweeps, where))
