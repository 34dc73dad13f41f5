"""`mgd bench offload`: the state store against raw direct I/O, and what a log on disk costs a metagradient."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from mgd.bench import figures, offload_sweep, shared, store_io, timing
from mgd.bench.workloads import WORKLOADS
from mgd.errors import BadArgument
from mgd.ui import machine
from mgd.ui.options import Json, Out, parse_names
from mgd.ui.page import Page, Section, Table
from mgd.util.text import format_bytes

ROOM = 4 << 30  # bytes of disk that the measurements use at most


def store_rows(results: list[dict[str, Any]]) -> Table:
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


def sweep_rows(results: list[dict[str, Any]]) -> Table:
    lines = [["", "sweep", "in memory, s", "on disk, s", "slower by", "its thread by", "promise"]]
    for run in results:
        for i, (sweep, promised) in enumerate(run["promised"].items()):
            wall = run["ratios"][f"{sweep} wall"]
            lines.append(
                [
                    f"{run['workload']}, snapshots {place_of(run)}" if i == 0 else "",
                    sweep,
                    f"{run['seconds']['memory'][f'{sweep} wall']['median']:.3f}",
                    f"{run['seconds']['disk'][f'{sweep} wall']['median']:.3f}",
                    f"{_percent(wall['median'])} ({_percent(wall['q20'])}, {_percent(wall['q80'])})",
                    _percent(run["ratios"][f"{sweep} thread"]["median"]),
                    f"{_percent(promised)} {verdict(run, sweep)}",
                ]
            )
    return lines


def conditions(run: dict[str, Any]) -> str:
    """Whether the promise is made for this training."""
    step, write = 1e3 * run["step_seconds"], 1e3 * run["write_seconds"]
    applies = "the promise applies" if step >= write else "the promise does not apply"
    return (
        f"{run['workload']}: {run['steps']} steps of {step:.2f} ms; the write of a gradient "
        f"({format_bytes(run['gradient_bytes'])}) takes {write:.2f} ms, so {applies}. Snapshots are "
        f"{place_of(run)}, {run['log_on_disk']} gradients on disk; the store's threads run "
        + ("on other cores." if run["apart"] else "on the core of the computation.")
    )


def place_of(run: dict[str, Any]) -> str:
    """Where a sweep had its snapshots, for people."""
    return "in memory" if run["snapshots_in"] == "memory" else "on disk"


def verdict(run: dict[str, Any], sweep: str) -> str:
    """Whether the promise holds; it is made where a step takes as long as the write of its gradient."""
    if run["step_seconds"] < run["write_seconds"]:
        return "does not apply"
    return "held" if run["ratios"][f"{sweep} wall"]["median"] <= run["promised"][sweep] else "missed"


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.0f}%"


SWEEP = (
    "The whole log on disk, against everything in memory, in alternation. slower by: median (20%, 80%) of wall time; "
    "its thread: CPU time of the computing thread alone, to judge by where others use the machine. "
    "The promise is made where a step takes at least as long as the write."
)


def page(stores: list[dict[str, Any]], sweeps: list[dict[str, Any]], where: dict[str, Any]) -> Page:
    def store() -> Section:
        entries = [
            (f"{way} {format_bytes(r['size'])}", 100 * r[f"{way}_ratio"], f"{r[way] / 1e9:.2f} GB/s")
            for r in stores
            for way in ("write", "read")
        ]
        picture = figures.bars("The store's bandwidth", "% of raw direct I/O", entries, (100, "raw"))
        return Section("Store", STORE, picture, "store", store_rows(stores))

    def both_sweeps() -> Section:
        slower = [
            (
                f"{run['workload']}, snapshots {place_of(run)}, {sweep}",
                100 * run["ratios"][f"{sweep} wall"]["median"] - 100,
                verdict(run, sweep),
            )
            for run in sweeps
            for sweep in run["promised"]
        ]
        picture = figures.bars("What a log on disk costs", "% more time than in memory", slower)
        text = "\n\n".join([SWEEP, *map(conditions, sweeps)])
        return Section("Both sweeps", text, picture, "offload", sweep_rows(sweeps))

    def sections() -> list[Section]:
        return [*([store()] if stores else []), *([both_sweeps()] if sweeps else [])]

    return Page("Log and snapshots on disk", machine.describe(where), sections=sections)


def command(
    directory: Annotated[
        Path | None,
        typer.Option(
            "--directory",
            metavar="DIR",
            help="A folder on the disk to measure. Default: the folder for temporary files.",
        ),
    ] = None,
    workload: Annotated[
        str,
        typer.Option(
            "--workload",
            metavar="A,B,...",
            help=f"One or more of {', '.join(WORKLOADS)}; none: measure the store only.",
        ),
    ] = "mlp,gpt",
    steps: Annotated[int, typer.Option("--steps", min=2, help="Number of training steps.")] = 48,
    sizes: Annotated[
        str,
        typer.Option(
            "--sizes",
            metavar="A,B,...",
            help=f"Sizes of an entry, of {', '.join(store_io.SIZES)}; none: measure the sweeps only.",
        ),
    ] = ",".join(store_io.SIZES),
    snapshots: Annotated[
        str, typer.Option("--snapshots", metavar="A,B", help="Where snapshots are kept: disk, memory, or both in turn.")
    ] = "disk,memory",
    apart: Annotated[
        bool, typer.Option("--apart", help="Run the store's threads on other cores than the computation.")
    ] = False,
    rounds: shared.Rounds = 7,
    core: shared.Core = -1,
    out: Out = None,
    json: Json = None,
) -> None:
    """The state store against raw direct I/O, and what a log on disk costs a metagradient."""
    wanted = [] if sizes == "none" else parse_names(sizes, store_io.SIZES, "sizes")
    sources = [] if workload == "none" else parse_names(workload, WORKLOADS, "workloads")
    placements = parse_names(snapshots, offload_sweep.SNAPSHOTS, "places of snapshots")
    place = directory or Path(tempfile.gettempdir())
    if not place.is_dir():
        raise BadArgument(f"expected a directory; got {str(place)!r}")
    if (free := shutil.disk_usage(place).free) < ROOM:
        raise BadArgument(f"expected {format_bytes(ROOM)} of free disk at {place}; got {format_bytes(free)}")
    session, where = shared.begin("bench offload", out, json)
    stores, sweeps = [], []
    with session.status() as tick:
        for size in wanted:
            tick(f"the store, entries of {size}")
            with timing.pinned(None):  # raw and store have threads of their own
                stores.append(store_io.measure(place, store_io.SIZES[size]))
        for name in sources:
            for placement in placements:
                tick(f"{name}, log on disk and in memory, snapshots: {placement}")
                made, on = WORKLOADS[name](steps=steps), shared.core_of(core)
                sweeps.append(offload_sweep.measure(made, place, rounds, on, placement, apart))
    if stores:
        session.table(f"The store at {place}, {stores[0]['io']} I/O", store_rows(stores), STORE)
    if sweeps:
        session.table("A log on disk", sweep_rows(sweeps), SWEEP)
        for run in sweeps:
            session.print(conditions(run))
    result = {"machine": where, "directory": str(place), "store": stores, "sweeps": sweeps}
    session.write(page(stores, sweeps, where), result)
