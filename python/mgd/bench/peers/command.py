"""The command: every peer on every workload, one process after the other or `--jobs` at a time."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from json import loads
from pathlib import Path
from typing import Annotated, Any

import typer

from mgd import __version__
from mgd.bench import shared
from mgd.bench.peers import alone, table
from mgd.bench.peers.methods import PEERS, QUICK, WORKLOADS
from mgd.bench.workloads import WORKLOADS as KNOWN
from mgd.errors import BadArgument
from mgd.ui.console import Session
from mgd.ui.options import Json, parse_names
from mgd.ui.result import write_json

STEPS, QUICK_STEPS = 8, 4
LIMIT = 300  # seconds that any other measurement may compute


def versions() -> dict[str, str]:
    """Of what is compared, as far as it is installed."""
    found = {"mgd-kernels": __version__}
    for package in dict.fromkeys(
        ["torch", "transformers", "peft", *(p for peer in PEERS.values() for p in peer.packages)]
    ):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


Keep = Callable[[str, dict[str, Any]], None]


def measure(source: str, steps: int, peers: list[str], rounds: int, limit: int, core: int, keep: Keep) -> None:
    """Of one workload: the float64 reference, plain training, and each peer, in JSON's types. limit: seconds, of peers
    that compile. keep: is given what was measured, and its name."""
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.pt"
        for what in (alone.REFERENCE, alone.TRAINING, *peers):
            compiles = what in PEERS and PEERS[what].compiles
            one = alone.measure(source, what, steps, rounds, reference, limit if compiles else LIMIT, core)
            keep(what, one)
            if what not in PEERS and "error" in one:
                return


def command(
    workload: Annotated[
        str, typer.Option("--workload", metavar="A,B,...", help=f"Some of {', '.join(WORKLOADS)}, or of the others.")
    ] = ",".join(WORKLOADS),
    peers: Annotated[str, typer.Option("--peers", metavar="A,B,...", help=f"Some of {', '.join(PEERS)}.")] = ",".join(
        PEERS
    ),
    steps: Annotated[
        int, typer.Option("--steps", min=4, help="Training steps; half of them are measured, too.")
    ] = STEPS,
    rounds: shared.Rounds = 2,
    limit: Annotated[
        int, typer.Option("--limit", min=10, help="Seconds that a peer that compiles may compute, on one workload.")
    ] = 75,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Workloads that are measured at a time, a core each.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"Workloads {', '.join(QUICK)} with {QUICK_STEPS} steps.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option("--page", metavar="FILE", help="Enter table and plot in this Markdown page.")
    ] = None,
    recorded: Annotated[
        str, typer.Option("--recorded", metavar="A,B,...", help="JSON files of earlier runs to show, nothing is run.")
    ] = "",
    json: Json = None,
) -> None:
    """The same metagradients by what people would use instead: time, memory, growth and difference from float64."""
    if quick:
        workload, steps, rounds = ",".join(QUICK), QUICK_STEPS, 1
    names, sources = parse_names(peers, PEERS, "peers"), parse_names(workload, KNOWN, "workloads")
    if page is not None and table.BEGIN not in page.read_text("utf-8"):
        raise BadArgument(f"expected {page} to have the line {table.BEGIN}")
    session, where = shared.begin("bench peers", None, json)
    if recorded:
        whole = _merged([loads(Path(name).read_text("utf-8")) for name in recorded.split(",")])
    else:
        results = [{"workload": source, "steps": steps, "peers": {}} for source in sources]
        about = {"versions": versions(), "limit": limit, "jobs": jobs, "rounds": rounds}
        whole = {"machine": where, **about, "results": results}
        _run(session, whole, names)
    for found in whole["results"]:
        session.table(table.title(found), table.rows(found))
    session.print(f"\n{table.CAPTION}", style="dim")
    session.write(None, whole)
    if page is not None:
        table.enter(page, whole)
    if wrong := table.disagreeing(whole["results"]):
        session.print(f"More than {table.AGREE:g} from float64: {', '.join(wrong)}.", style="bold red")
        raise typer.Exit(1)


def _merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs of one machine with the same versions, as one: of a workload that is in several, the peers are joined, and
    the first measurement of each is shown, or the first error."""
    first = runs[0]
    for one in runs:
        both = [(one["versions"][name], version) for name, version in first["versions"].items()]
        if any(a != b for a, b in both if "not installed" not in (a, b)) or one["rounds"] != first["rounds"]:
            raise BadArgument("expected recorded runs with the same versions and rounds")
        for found in one["results"]:  # a ratio is to the training of its own run
            for peer in found["peers"].values():
                peer.setdefault("alone", found["training"]["seconds"]["median"])
    joined: dict[tuple[str, int], dict[str, Any]] = {}
    for found in (found for one in runs for found in one["results"]):
        before = joined.setdefault((found["workload"], found["steps"]), found)
        measured = {name: one for name, one in found["peers"].items() if "error" in before["peers"].get(name, {})}
        before["peers"] = found["peers"] | before["peers"] | {k: x for k, x in measured.items() if "error" not in x}
    for found in joined.values():
        found["peers"] = {name: found["peers"][name] for name in PEERS if name in found["peers"]}
    return first | {"results": list(joined.values())}


def _run(session: Session, whole: dict[str, Any], names: list[str]) -> None:
    """Measure, and write the JSON after every measurement, so that it is kept if the rest is interrupted."""
    session.print(", ".join(f"{package} {version}" for package, version in whole["versions"].items()))
    cores, jobs = sorted(os.sched_getaffinity(0))[::-1], whole["jobs"]
    writing = threading.Lock()

    def kept(found: dict[str, Any], what: str, one: dict[str, Any]) -> None:
        with writing:
            if what in PEERS:
                found["peers"][what] = one
            elif "error" in one:
                found["error"] = f"{what}: {one['error']}"
            else:
                found[what] = one
            session.print(f"{found['workload']}: {what}" + (f": {one['error']}" if "error" in one else ""))
            if session.json is not None:
                write_json(session.json, session.command, whole)

    def workload(i: int) -> None:
        found = whole["results"][i]
        core = cores[i % jobs % len(cores)]
        measure(found["workload"], found["steps"], names, whole["rounds"], whole["limit"], core, partial(kept, found))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(workload, range(len(whole["results"]))))
