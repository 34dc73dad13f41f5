"""What the host does for a part of a step that runs as a device graph, beside the launch: on the CPU, without one.

Of each part: the operators that it is launched as one by one; and the microseconds of a call by its recording, which
compares its inputs with those of the recording, copies them in, and hands out copies of the outputs. A copy is the
CPU's here, where a GPU's would be one launch. Processor time, the least of many rounds.

Run: python benchmarks/bench_device_graphs.py --json FILE
"""

from __future__ import annotations

import argparse
import functools
import json
import time
import timeit
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mgd import TrainingFunction
from mgd.autodiff import cuda_graphs, device_graphs
from mgd.autodiff.device_graphs import DeviceGraph
from mgd.autodiff.device_recording import Packed
from mgd.autodiff.execution import below_autograd
from mgd.bench import overhead
from mgd.bench.cases import load

STEPS = 16


class Again:
    """A recorder that replays by running once more."""

    alignment, held = 64, 0

    def __init__(self, device: torch.device):
        pass

    def settings(self) -> Hashable:
        return cuda_graphs.settings()

    def random_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_random_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        return run


class Count(TorchDispatchMode):
    """Operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += not any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
        return func(*args, **(kwargs or {}))


def measure(function: TrainingFunction, z: Any, rounds: int) -> list[dict[str, float]]:
    """Of the parts that the reverse sweep and the training run by."""
    calls: dict[DeviceGraph, tuple[Any, ...]] = {}
    call = DeviceGraph.__call__

    def noting(graph: DeviceGraph, *inputs: Any) -> Any:
        if not isinstance(inputs[-1], Packed):  # it calls another one with the memory
            calls[graph] = inputs
        return call(graph, *inputs)

    DeviceGraph.__call__ = noting
    try:
        for _ in range(3):  # parameters that have moved are copied by now
            function.metagradient(z)
    finally:
        DeviceGraph.__call__ = call
    rows = []
    for graph, inputs in calls.items():
        confirmed = [x for x in graph.recordings.values() if x.confirmed]
        if not confirmed:
            continue
        with Count() as count, below_autograd():
            graph.run(*inputs)
        replayed, confirmed[0]._replay = confirmed[0]._replay, lambda: None
        with below_autograd():
            call_it = functools.partial(graph, *inputs)
            seconds = min(timeit.repeat(call_it, timer=time.process_time, number=200, repeat=rounds)) / 200
        confirmed[0]._replay = replayed
        sizes = {"inputs": len(inputs), "outputs": sum(x is not None for x in confirmed[0]._plan)}
        rows.append({"operators": count.found, **sizes, "microseconds": 1e6 * seconds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device_graphs.RECORDERS["cpu"] = Again
    found = {}
    for name in ("smallest", "small"):
        if name == "smallest":
            function, z = overhead.smallest(STEPS)
        else:
            case = load(name, STEPS)
            function, z = case.function.replaced(trace=True), case.z
        found[name] = measure(function, z, options.rounds)
        for row in found[name]:
            print(name, ", ".join(f"{key} {value:.0f}" for key, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps({"steps": STEPS, "parts": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
