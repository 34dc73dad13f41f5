"""What a log on disk costs a metagradient: the time of both sweeps, against everything in memory.

The promise holds where a step takes at least as long as writing its gradient: the transfers then hide behind the
computation, and what is left is the copy of every entry to and from the store's buffers.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from typing import Any

from mgd import Budget, TrainingFunction
from mgd.bench.timing import pinned, quantiles
from mgd.bench.workloads import Workload, mlp

# Of the machine; of the computing thread; and of the whole process, the store's threads included.
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time, "process": time.process_time}

PROMISED = {"forward": 1.05, "reverse": 1.10}  # of the time in memory


def measure(
    workload: Workload | None = None,
    directory: str | os.PathLike[str] | None = None,
    rounds: int = 7,
    core: int | None = -1,
) -> dict[str, Any]:
    """Both sweeps with the whole log and all snapshots on disk, alternating with the same in memory.

    directory: on the disk to measure; the system's place for temporary files by default. The store has 32 MiB of
    buffers; its own threads share `core` with the computation.

    Returns seconds by each clock of each sweep and variant, the ratios of disk to memory (quantiles over the rounds,
    each of which runs both), and what the disk did. `step_seconds` and `write_seconds` (of one gradient) tell whether
    the promise applies. Where others use the machine, the clock of the computing thread is the one to judge by.
    """
    workload = workload or mlp()
    z = workload.z()
    with pinned(core) as pinning, tempfile.TemporaryDirectory(dir=directory) as place:
        budgets = {"memory": Budget(host=1 << 40), "disk": Budget(disk=(place, 1 << 40))}
        variants = {name: workload.function(schedule="log", budget=budget) for name, budget in budgets.items()}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
        for function in variants.values():
            function.metagradient(z)  # traces, and measures the costs that the plans are made from
        for i in range(rounds):
            order = list(variants) if i % 2 == 0 else list(variants)[::-1]
            for name in order:
                runs[name].append(_run(variants[name], z))
    costs, store = variants["disk"]._costs, runs["disk"][-1]["store"]
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
        "snapshots": {name: measured[-1]["plan"]["inner_snapshots"] for name, measured in runs.items()},
        "rebuilt_steps": {name: measured[-1]["rebuilt"] for name, measured in runs.items()},
        "pinning": pinning,
        "rounds": rounds,
    }


def _run(function: TrainingFunction, z: dict[str, Any]) -> dict[str, Any]:
    """One metagradient, its two halves timed apart."""
    marks = []

    def mark() -> None:
        marks.append({name: clock() for name, clock in CLOCKS.items()})

    with function._guarded() as tick:
        mark()
        run = function._forward(z, tick)
        mark()
        run.reverse()
        mark()
    spans = [{name: b[name] - a[name] for name in CLOCKS} for a, b in itertools.pairwise(marks)]
    report = function._report(run)
    return {
        "forward": spans[0],
        "reverse": spans[1],
        "plan": report.plan,
        "store": report.store,
        "rebuilt": report.counts.get("rebuilt steps", 0),
    }
