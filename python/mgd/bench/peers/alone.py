"""One peer on one workload, in a process of its own with one thread on one core: time, memory, and how right it is.

The first call is told apart, since it compiles or captures. What is timed is a later one, by the time that the process
computes: what else runs on the machine counts little. The float64 reference is plain torch, a step at a time.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mgd.bench import baselines, peak, timing
from mgd.bench.cases import Case, load
from mgd.bench.methods import differences, training
from mgd.bench.peers.methods import PEERS
from mgd.bench.workloads import WORKLOADS
from mgd.step.batches import to_dtype
from mgd.ui.result import finite
from mgd.util.system import keep_freed_memory

REFERENCE, TRAINING = "float64", "training"  # what a process measures besides the peers
WARM = 60  # calls of the default, at most, before it is timed: until it has captured, which short trainings do late
WARMING = 12  # seconds, at most, for these calls
XLA = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def measure(source: str, peer: str, steps: int, rounds: int, reference: Path, limit: int, core: int) -> dict[str, Any]:
    """What `_answer` finds, or `{"error": why not}`. limit: of the process, in seconds that it computes."""
    request = {
        "source": source,
        "peer": peer,
        "steps": steps,
        "rounds": rounds,
        "reference": str(reference),
        "limit": limit,
    }

    def before() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        os.sched_setaffinity(0, {core})

    with tempfile.TemporaryDirectory() as folder:
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        own = {"TORCHINDUCTOR_CACHE_DIR": folder, "XLA_FLAGS": XLA, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-m", "mgd.bench.peers.alone", json.dumps(request)],
            capture_output=True,
            text=True,
            env={**os.environ, **one_thread, **own},
            cwd=folder,  # in the project's own folder, its sources would be found, which have no compiled kernels
            preexec_fn=before,
        )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode == -signal.SIGXCPU:
        return {"error": f"stopped after {limit} s of processor time"}
    if done.returncode == -signal.SIGKILL:
        return {"error": "killed by the system, probably for its memory"}
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no message"]
    return {"error": _last_error(lines)}


def _last_error(lines: list[str]) -> str:
    """The line of a traceback that names the error: the last that begins at the margin with a name and a colon."""
    named = [line for line in lines if line[:1].isalpha() and ":" in line and " " not in line.partition(":")[0]]
    return (named or lines)[-1].strip()[:300]


# --- in the process of its own -----------------------------------------------------------------------------------


def _double(source: str, steps: int) -> Case:
    workload = WORKLOADS[source](steps=steps)
    workload.model.double()
    batches, held_out = to_dtype((workload.batches, workload.held_out), torch.float64)
    workload = replace(workload, batches=batches, held_out=held_out)
    z = {key: value.double() for key, value in workload.z().items()}
    return Case(source, workload.function(), z, held_out=held_out)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    source, steps, rounds = request["source"], request["steps"], request["rounds"]
    reference = Path(request["reference"])
    if request["peer"] == REFERENCE:
        case = _double(source, steps)
        value, grads = baselines.sqrt(case.function, case.z)
        torch.save({"value": value, "grads": grads}, reference)
        return {"value": float(value)}
    case = load(source, steps)
    if request["peer"] == TRAINING:
        alone, by = _plain(source, steps, rounds)
        trained = sum(p.numel() for p in case.function.model.parameters() if p.requires_grad)
        return {"seconds": alone, "by": by, "parameters": trained}
    peer = PEERS[request["peer"]]
    ours = request["peer"] == "mgd"
    found: dict[str, Any] = {}
    for length in (steps // 2, steps):
        part = case.shortened(length)
        run = peer.prepare(part)
        computed = _computed()
        # Nothing but what was compiled is new at the second length.
        outcome = run() if length < steps or ours or peer.compiles else None
        found.setdefault("first_seconds", _computed() - computed)
        if ours:
            told = lambda outcome: outcome.report.execution
            calls = 1
            until = _computed() + WARMING
            while length == steps and calls < WARM and "captured" not in told(outcome) and _computed() < until:
                outcome, calls = run(), calls + 1
            found["calls_before"], found["execution"] = calls, told(outcome)
        del outcome
        kept = []
        with peak._Rise("cpu") as rise:
            seconds = timing.seconds_of(lambda: kept.append(run()), clock=time.process_time)  # noqa: B023
        found.setdefault("bytes", {})[str(length)] = rise.bytes
    # In one of our calls the default may have captured, which is a matter of once.
    more = [timing.seconds_of(lambda: kept.append(run()), clock=time.process_time) for _ in range(rounds - 1 + ours)]
    times = zip([seconds, *more], kept, strict=True)
    plain = [each for each, outcome in times if not outcome.report or "capture" not in outcome.report.seconds]
    found["seconds"] = timing.quantiles(plain[:rounds])
    found["alone"] = _plain(source, steps, rounds)[0]["median"]
    wanted = torch.load(reference, weights_only=True)
    found["difference"] = differences(kept[0].grads, wanted["grads"])
    found["missing"] = sorted(set(wanted["grads"]) - set(kept[0].grads))
    return found


def _plain(source: str, steps: int, rounds: int) -> tuple[dict[str, float], str]:
    """The time of plain training now, and what that is. A shared machine is twice as fast at one minute as at another:
    a peer's time is set against one of its own process, taken right after it."""
    run, by = training(load(source, steps))
    run()
    return timing.quantiles([timing.seconds_of(run, clock=time.process_time) for _ in range(rounds)]), by


def _computed() -> float:
    """Seconds that this process and those that it has waited for, compilers for instance, have computed."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    keep_freed_memory()
    print(json.dumps(finite(_answer(json.loads(sys.argv[1])))))
