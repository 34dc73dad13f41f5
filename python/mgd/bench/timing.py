"""How every benchmark here takes times: one thread on one core, in alternation with what it is compared with."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mgd.errors import BadArgument


@contextlib.contextmanager
def pinned(core: int | None, threads: int = 1) -> Iterator[dict[str, Any]]:
    """Run the block with `threads` threads of torch, the calling thread on `core` (None: wherever the system puts it;
    -1: on the last core that it may use). Yields what was done."""
    before = torch.get_num_threads()
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(threads)
    try:
        if core is None or allowed is None:
            yield {"threads": threads, "core": None}
            return
        core = max(allowed) if core == -1 else core
        if core not in allowed:
            raise BadArgument(f"expected a core among {sorted(allowed)}, those that this process may use; got {core}")
        os.sched_setaffinity(0, {core})
        yield {"threads": threads, "core": core}
    finally:
        torch.set_num_threads(before)
        if allowed is not None:
            os.sched_setaffinity(0, allowed)


Clock = Callable[[], float]


def seconds_of(work: Callable[[], Any], device: torch.device | str = "cpu", clock: Clock = time.perf_counter) -> float:
    """Time of one call, with everything that it started on the device. A method `reset` runs before it.

    clock: `time.process_time` does not count while another process has the core, nor while this one waits for a disk.
    """
    getattr(work, "reset", lambda: None)()
    _wait(device)
    start = clock()
    work()
    _wait(device)
    return clock() - start


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type != "cpu":
        torch.get_device_module(device).synchronize(device)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, and the 20% and 80% quantiles."""
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return {"median": float(middle), "q20": float(low), "q80": float(high)}


@dataclass
class Samples:
    """Of one method: seconds, and ratios to the baseline's seconds beside them."""

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {"seconds": quantiles(self.seconds), "ratio": quantiles(self.ratios), "rounds": len(self.seconds)}


def alternate(
    rounds: int,
    baseline: Callable[[], Any],
    methods: Mapping[str, Callable[[], Any]],
    device: torch.device | str = "cpu",
    tick: Callable[[str], None] = lambda _: None,
    clock: Clock = time.perf_counter,
) -> tuple[list[float], dict[str, Samples]]:
    """Seconds of the baseline, and samples of every method, all in turn: a ratio is to the mean of the baseline run
    just before and the one just after. Everything has run once before."""
    found = {name: Samples() for name in methods}
    names = list(methods)
    baselines = [seconds_of(baseline, device, clock)]
    for round_ in range(rounds):
        shift = round_ % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            tick(f"round {round_ + 1} of {rounds}: {name}")
            gc.collect()
            seconds = seconds_of(methods[name], device, clock)
            baselines.append(seconds_of(baseline, device, clock))
            found[name].seconds.append(seconds)
            found[name].ratios.append(2 * seconds / (baselines[-2] + baselines[-1]))
    return baselines, found


def least(rounds: int, *functions: Callable[[], Any], device: torch.device | str = "cpu") -> list[float]:
    """The least time of each in seconds, all of them run in turn: for memory-bound work, which noise only slows."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            best[i] = min(best[i], seconds_of(function, device))
    return best
