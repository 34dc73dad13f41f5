"""A process that runs resumable metagradients on demand, each in a fork of its own that may be killed or starved.

`python victim.py DIRECTORY` reads requests as lines of JSON and answers each with one; `Victim` is the other side.
A request may say: directory; `kill`, the disk-changing call before which the process ends; `stop`, the evaluation of a
step at which it does; `fault`, [kind, nth, times] of the store's fault injection; `limits`, of resource limits by name;
`other`, to run another metagradient, which differs in z; `schedule`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
STEPS, CHECKPOINT_EVERY = 7, 2
SECONDS = 60  # for one metagradient, which takes well below one


class Victim:
    """`run` returns what came of one metagradient.

    signal: what ended the process, 0 if nothing. outcome: "right", "wrong", the name of an error of mgd or mgd_kernels,
    or "raw" for any other; "hung" if it had to be ended. changes: calls that changed the disk. peak: bytes of memory
    beyond those of an idle process. text: of the error. record: of the calls, where the fault is "recorded".
    """

    def __init__(self, directory: Path):
        command = [sys.executable, "-W", "ignore", __file__, str(directory)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, directory: Path, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request | {"directory": str(directory)}), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(SECONDS)


def memory_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def metagradient(request: dict[str, Any], reference: Any) -> dict[str, Any]:
    """In the fork: one metagradient, and what came of it."""
    from interruptions import die_at, outcome, training

    from mgd.errors import KernelError, MetagradientError
    from mgd.plan import training as planning
    from mgd_kernels import _core

    planning.CHECKPOINT_EVERY = CHECKPOINT_EVERY
    f, z = training(STEPS, trace=False, schedule=request.get("schedule", "auto"))
    if request.get("other"):
        z["lr"] *= 2
    die_at(request.get("stop", 0))
    for name, value in request.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (value, value))
    before = memory_peak()
    _core.store_inject(*request.get("fault", ["killed", request.get("kill", 1 << 40)]))
    try:
        result = outcome(f.metagradient(z, resume=request.get("directory")))
        found, text = "right" if reference is None or same_bits(result, reference) else "wrong", ""
    except (KernelError, MetagradientError) as error:
        found, text, result = type(error).__name__, str(error), None
    except Exception:
        found, text, result = "raw", traceback.format_exc(), None
    answer = {"outcome": found, "text": text, "changes": _core.store_inject("none"), "peak": memory_peak() - before}
    if request.get("fault", [""])[0] == "recorded":
        answer["record"] = _core.store_record()
    return answer | ({"result": result, "modules": sorted(sys.modules)} if reference is None else {})


def same_bits(a: list[Any], b: list[Any]) -> bool:
    import torch

    return len(a) == len(b) and all(map(torch.equal, a, b))


def in_fork(request: dict[str, Any], reference: Any, files: Path) -> dict[str, Any]:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        answer = metagradient(request, reference)
        if "result" in answer:
            import torch

            torch.save((answer.pop("result"), answer.pop("modules")), files / "reference.pt")
        os.write(theirs, json.dumps(answer).encode())
        os._exit(0)
    os.close(theirs)
    ready = select.select([ours], [], [], SECONDS)[0]
    if ready:  # it answers, or ends
        with os.fdopen(ours, "rb") as pipe:
            answer = pipe.read()
    else:
        os.close(ours)
        answer = b""
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    nothing = {"outcome": "ended" if ready else "hung", "text": "", "changes": 0, "peak": 0}
    return {"signal": max(0, -status), **(json.loads(answer) if answer else nothing)}


def serve(files: Path) -> None:
    import torch

    torch.set_num_threads(1)
    sys.path[:0] = [str(TESTS), str(TESTS / "mgd")]
    references: dict[bool, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        other = bool(request.get("other"))
        if other not in references:  # in a fork, too: torch's autograd does not work in a fork of who used it
            computed = in_fork({"directory": None, "other": other}, None, files)
            assert computed["outcome"] == "right", computed
            references[other], modules = torch.load(files / "reference.pt")
            for name in modules:  # once here, rather than in every fork
                if name.partition(".")[0] in ("torch", "mgd", "mgd_kernels", "interruptions"):
                    with contextlib.suppress(ImportError):
                        importlib.import_module(name)
        print(json.dumps(in_fork(request, references[other], files)), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
