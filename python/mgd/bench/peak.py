"""Peak memory of one method on one case, measured in a process of its own.

What is counted is how far the process's resident memory (VmHWM) rises above where it stood before the call: model,
data and libraries are loaded by then, and a tiny call of the same method has been made. On a GPU it is torch's peak
of allocated memory above what was allocated before.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from mgd.autodiff.captured import CapturedEvaluator
from mgd.bench import timing
from mgd.bench.cases import Case, load
from mgd.bench.methods import METHODS, Method, Outcome, package, training
from mgd.errors import MetagradientError
from mgd.ui.result import finite
from mgd.util.fingerprint import digest
from mgd.util.system import free_memory, keep_freed_memory, return_freed_memory

SHARE = 0.6  # of the free memory that a method may be expected to take before it is extrapolated instead
PROBES = (4, 8)  # steps of the short trainings from which the memory of a long one is extrapolated


class Failed(MetagradientError, RuntimeError):
    """The process that should measure memory ended with an error."""


def measure(
    source: str,
    method: str,
    steps: int | None = None,
    device: str = "cpu",
    options: dict[str, Any] | None = None,
    rounds: int = 0,
    core: int | None = None,
) -> dict[str, Any]:
    """`{"bytes": ..., "seconds": of the call measured, "norms", "digest": of its gradients, "report": ...}`.

    source, steps, device: of the case. method: a name of METHODS, "training", or "package" with `options` of the
    training function ("budget" as the arguments of `Budget`). rounds: time that many calls in alternation with plain
    training, "timing" in the result: quantiles of seconds and ratios.
    """
    request = {
        "source": source,
        "method": method,
        "steps": steps,
        "device": device,
        "options": options or {},
        "rounds": rounds,
        "core": core,
    }
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mgd.bench.peak", json.dumps(request)],
        capture_output=True,
        text=True,
        env={**os.environ, **one_thread},
    )
    if done.returncode:
        what = f"{method} on {source}" + (f" with {steps} steps" if steps else "")
        if done.returncode == -9:
            raise Failed(f"the process that measured {what} was killed; it probably ran out of memory")
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise Failed(f"the process that measured {what} ended with code {done.returncode}: {reason[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def line(points: list[tuple[int, float]], steps: int) -> float:
    """The value at `steps` of the straight line through the last two points `(steps, bytes)`."""
    (a, bytes_a), (b, bytes_b) = points[-2:]
    return bytes_b + (bytes_b - bytes_a) / (b - a) * (steps - b)


def extrapolated(source: str, method: str, steps: int, device: str = "cpu") -> dict[str, Any]:
    """Bytes at `steps` on the line through two short trainings, and the most steps that fit in free memory."""
    points = [(t, float(measure(source, method, t, device)["bytes"])) for t in PROBES]
    each = max(1.0, (points[1][1] - points[0][1]) / (PROBES[1] - PROBES[0]))
    room = SHARE * (torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else free_memory())
    fits = PROBES[1] + int((room - points[1][1]) / each)
    return {"bytes": int(line(points, steps)), "fits_steps": max(PROBES[0], fits), "from_steps": list(PROBES)}


# --- in the process of its own -----------------------------------------------------------------------------------


class _Rise:
    """Bytes by which memory has risen above the beginning of the block at most."""

    def __init__(self, device: str):
        self.device = device if device.startswith("cuda") else None

    def __enter__(self) -> _Rise:
        gc.collect()
        if self.device:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        return_freed_memory()
        self.resettable = True
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again from VmRSS
            self.before = _status("VmRSS")
        except OSError:
            self.resettable, self.before = False, _maxrss()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device:
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        else:
            self.bytes = (_status("VmHWM") if self.resettable else _maxrss()) - self.before


def _status(name: str) -> int:
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(f"{name}:"):
            return int(text.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def _maxrss() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _prepared(case: Case, request: dict[str, Any]) -> Any:
    if request["method"] == "training":
        return training(case)[0]
    if request["method"] == "package":
        from mgd.plan.budget import Budget

        options = dict(request["options"])
        if "budget" in options:
            options["budget"] = Budget(**options["budget"])
        return Method("", package(**options)).prepare(case)
    return METHODS[request["method"]].prepare(case)


def _execution(request: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in request["options"].items() if key in ("trace", "compile")}


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    device = request["device"]
    if request["method"] == "mgd":  # the package as it is set up, which may trace
        request = request | {"method": "package"}
    case = load(request["source"], request["steps"], device)
    # Libraries, thread pools and lazy imports come first, by a tiny call of the same kind.
    evaluator = case.function.replaced(**_execution(request))._evaluator
    tracing = request["method"] == "package" and isinstance(evaluator, CapturedEvaluator)
    warm = request | {"options": {"trace": tracing, **_execution(request)}}
    _prepared(load("small", 2, device), warm)()
    with timing.pinned(request["core"]):
        run, outcomes = _prepared(case, request), []
        with _Rise(device) as rise:
            seconds = timing.seconds_of(lambda: outcomes.append(run()), device)
        found: dict[str, Any] = {"bytes": rise.bytes, "seconds": seconds}
        outcome = outcomes.pop()
        if isinstance(outcome, Outcome):
            found["norms"] = {
                key: float(g.double().norm()) for key, g in outcome.grads.items() if isinstance(g, Tensor)
            }
            found["digest"] = digest(*tree_flatten(outcome.grads)[0])
            found["report"] = outcome.report.to_dict() if outcome.report else None
        if request["rounds"]:
            train = training(case)[0]
            train()
            baselines, samples = timing.alternate(request["rounds"], train, {"it": run}, device)
            found["timing"] = samples["it"].summary()
            found["training_seconds"] = timing.quantiles(baselines)
    return found


if __name__ == "__main__":
    keep_freed_memory()
    print(json.dumps(finite(_answer(json.loads(sys.argv[1])))))
