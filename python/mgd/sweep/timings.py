"""Seconds and counts by kind of work, filled while the sweeps run, and the costs that the next plan takes from them."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from mgd.plan.budget import RESIDUALS, Costs
from mgd.plan.training import transfers
from mgd.util.profiler import phase

ENOUGH = 1 << 20  # bytes, from which on a transfer's bandwidth is worth remembering


@dataclass
class Timings:
    """seconds, counts: by kind of work. phases: seconds of the plan's phases (see `Plan.phases`). firsts: of each kind
    of work, the seconds of the first time, and the number of times. parts: seconds of what is a part of some work."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: Counter = field(default_factory=Counter)
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    firsts: dict[str, tuple[float, int]] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _timers: dict[str, Timer] = field(default_factory=dict)

    def timed(self, work: str) -> Timer:
        """Adds the seconds of a block to those of this kind of work."""
        if work not in self._timers:
            self._timers[work] = Timer(self.seconds, work, self.firsts)
        return self._timers[work]

    def part(self, kind: str) -> Timer:
        """Adds the seconds of a block to those of a kind that is a part of some work."""
        return Timer(self.parts, kind, self.firsts)

    def phase(self, name: str) -> Timer:
        """Adds the seconds of a block to those of a phase of the plan."""
        return Timer(self.phases, name)

    def move(self, seconds: float, work: str, other: str) -> None:
        """Of what was last added to a kind of work, so many seconds belong to another one."""
        self.seconds[work] -= seconds
        self.seconds[other] += seconds
        first, times = self.firsts[work]
        if times == 1:
            self.firsts[work] = first - seconds, 1

    def mean(self, work: str) -> float:
        """Seconds each time. The first is left out: it warms up."""
        first, times = self.firsts.get(work, (0.0, 0))
        seconds = self.parts.get(work, self.seconds.get(work, 0.0))  # asking makes no entry
        return (seconds - first) / (times - 1) if times > 1 else first

    def _hvp(self) -> tuple[float, float]:
        """Of one step's second derivatives, computed again and from residuals; of one that was not measured, or by
        autograd before a capture, as `RESIDUALS` estimates. Residuals save no more than the step's gradient."""
        again, kept = self.mean("hvp, computed again"), self.mean("hvp, residuals kept")
        gradient = self.mean("training")
        saved = RESIDUALS * gradient
        if kept and (not again or self.seconds.get("capture")):
            again = kept + saved
        elif not kept:
            kept = max(0.0, again - saved)
        return again, min(again, max(kept, again - gradient))

    def costs(self, store: dict[str, Any] | None, device: torch.device) -> Costs | None:
        """What the work cost, for the plan of the next metagradient; None where a part of it was never done.

        store: what `Store.stats` says, where there was a store.
        """
        step, (again, kept) = self.mean("training") + self.mean("update"), self._hvp()
        rebuilt = self.counts["rebuilt steps"]
        if not step or not again:
            return None
        rates = {way: store[way] for way in ("write", "read") if store and store[way]["bytes"] >= ENOUGH}
        write, read = ({"disk": rates[way]["bandwidth"]} if way in rates else {} for way in ("write", "read"))
        transfer = transfers(device.type != "cpu", write)
        return Costs(
            step=step,
            hvp=self.mean("optimizer vjp") + again,
            hvp_kept=self.mean("optimizer vjp") + kept,
            update=self.seconds["rebuild"] / rebuilt if rebuilt else self.mean("update"),
            **transfer | {"read": {**transfer.get("read", {}), **read}},
        )


class Timer:
    """Adds the seconds of blocks to a total, and marks them in a profile; the blocks of one timer do not nest."""

    def __init__(self, seconds: dict[str, float], name: str, firsts: dict[str, tuple[float, int]] | None = None):
        self.seconds, self.name, self.firsts = seconds, name, firsts

    def __enter__(self) -> None:
        self.mark = phase(self.name)
        if self.mark is not None:
            self.mark.__enter__()
        self.start = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        seconds = time.perf_counter() - self.start
        self.seconds[self.name] += seconds
        if self.firsts is not None:
            known = self.firsts.get(self.name)
            self.firsts[self.name] = (seconds, 1) if known is None else (known[0], known[1] + 1)
        if self.mark is not None:
            self.mark.__exit__(*error)
