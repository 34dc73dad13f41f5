"""What a log on disk costs a metagradient: the time of both sweeps, against everything in memory.

The promise holds where a step takes at least as long as writing its gradient: the transfers then hide behind the
computation, and what is left are checksums and the copies of snapshots to and from the store's buffers.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from mgd import Budget, TrainingFunction
from mgd.bench.timing import pinned, quantiles
from mgd.bench.workload import Workload
from mgd.bench.workloads import mlp
from mgd.errors import BadArgument
from mgd.plan.training import STAGING
from mgd.sweep.report import report_of

# Of the machine; of the computing thread; and of the whole process, the store's threads included.
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time, "process": time.process_time}

PROMISED = {"forward": 1.05, "reverse": 1.10}  # of the time in memory
SNAPSHOTS = ("disk", "memory")


def measure(
    workload: Workload | None = None,
    directory: str | os.PathLike[str] | None = None,
    rounds: int = 7,
    core: int | None = -1,
    snapshots: str = "disk",
    apart: bool = False,
) -> dict[str, Any]:
    """Both sweeps with the whole log on disk, alternating with everything in memory.

    directory: on the disk to measure; by default the system's place for temporary files.
    snapshots: where they are kept: "disk"; or "memory", with as many as a disk budget alone would keep there, as far as
        their room has no use as a log. The store has 32 MiB of buffers, or those of three gradients.
    apart: the store's threads run on the process's other cores, not on `core` with the computation.

    Returns seconds by each clock of each sweep and variant, the ratios of disk to memory (quantiles over the rounds,
    each of which runs both), and what the disk did. `step_seconds` and `write_seconds` (of one gradient) tell whether
    the promise applies. Where others use the machine, the clock of the computing thread is the one to judge by.
    """
    workload = workload or mlp()
    z = workload.z()
    others = os.sched_getaffinity(0) - {max(os.sched_getaffinity(0)) if core == -1 else core}
    if apart and not others:
        raise BadArgument("expected a second core for the store's threads; got a process that may use one")
    with pinned(core) as pinning, tempfile.TemporaryDirectory(dir=directory) as place:
        budgets = {"memory": Budget(host=1 << 40), "disk": Budget(disk=(place, 1 << 40))}
        variants = {name: workload.function(schedule="log", budget=budget) for name, budget in budgets.items()}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
        for function in variants.values():
            function.metagradient(z)  # traces, and measures the costs that the plans are made from
        if snapshots == "memory":
            variants["disk"] = _with_snapshots_in_memory(workload, variants["disk"], place)
            variants["disk"].metagradient(z)
        for i in range(rounds):
            order = list(variants) if i % 2 == 0 else list(variants)[::-1]
            for name in order:
                runs[name].append(_run(variants[name], z, others if apart else set()))
    costs, store = variants["disk"]._costs, runs["disk"][-1]["store"]
    assert costs is not None  # measured by now
    gradient = runs["disk"][-1]["plan"]["sizes"]["gradient"]
    ratios = {
        f"{sweep} {clock}": quantiles(
            [a[sweep][clock] / b[sweep][clock] for a, b in zip(runs["disk"], runs["memory"], strict=True)]
        )
        for sweep in PROMISED
        for clock in CLOCKS
    }
    return {
        "workload": workload.name,
        "steps": len(workload.batches),
        "gradient_bytes": gradient,
        "step_seconds": costs.step,
        "write_seconds": gradient / store["write"]["bandwidth"],
        "seconds": {
            name: {
                f"{sweep} {clock}": quantiles([run[sweep][clock] for run in measured])
                for sweep in PROMISED
                for clock in CLOCKS
            }
            for name, measured in runs.items()
        },
        "ratios": ratios,
        "promised": PROMISED,
        "io": store["disk"]["io"],
        "bandwidth": {way: store[way]["bandwidth"] for way in ("write", "read")},
        "read_ahead": store["read_ahead"],
        "handed": store["handed"],
        "snapshots_in": snapshots,
        "snapshots": {name: measured[-1]["plan"]["inner_snapshots"] for name, measured in runs.items()},
        "log_on_disk": min(run["plan"]["logged_gradients"]["disk"] for run in runs["disk"]),
        "apart": sorted(others) if apart else None,
        "rebuilt_steps": {name: measured[-1]["rebuilt"] for name, measured in runs.items()},
        "pinning": pinning,
        "rounds": rounds,
    }


def _with_snapshots_in_memory(workload: Workload, on_disk: TrainingFunction, place: str) -> TrainingFunction:
    """The same with a host budget for the snapshots, or for as many of them as leave no room for a gradient there."""
    made = on_disk.plan()
    buffers = 3 * max(made.sizes.gradient, STAGING // 3) + 3  # see mgd.plan.training.staging
    for count in range(sum(made.to_dict()["inner_snapshots"].values()), 0, -1):
        budget = Budget(host=buffers + count * made.sizes.snapshot, disk=(place, 1 << 40))
        function = workload.function(schedule="log", budget=budget)
        function._costs = on_disk._costs
        if not function.plan().to_dict()["logged_gradients"]["host"]:
            return function
    return on_disk


def _run(function: TrainingFunction, z: dict[str, Any], store_cores: set[int]) -> dict[str, Any]:
    """One metagradient, its two halves timed apart. store_cores: for the store's threads; none: where they are."""
    marks = []
    unplaced = [store_cores] if store_cores else []

    def mark() -> None:
        marks.append({name: clock() for name, clock in CLOCKS.items()})

    with function._guarded() as tick:
        mark()

        def place_and_tick(phase: str, steps: int = 1) -> None:
            if unplaced:  # the store's threads start within the call
                _place_store(unplaced.pop())
            tick(phase, steps)

        sweep = function._trained(z, place_and_tick)
        mark()
        function._reversed(sweep, z)
        mark()
    spans = [{name: b[name] - a[name] for name in CLOCKS} for a, b in itertools.pairwise(marks)]
    report = report_of(sweep)
    return {
        "forward": spans[0],
        "reverse": spans[1],
        "plan": report.plan,
        "store": report.store,
        "rebuilt": report.counts.get("rebuilt steps", 0),
    }


def _place_store(cores: set[int]) -> None:
    """Put the store's threads, which begin where their maker runs, on these cores."""
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "mgd-store":
            os.sched_setaffinity(int(task.name), cores)
