"""Seconds and counts by kind of work, filled while the sweeps run, and the costs that the next plan takes from them."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from mgd.plan.budget import RESIDUALS, Costs
from mgd.plan.training import transfers
from mgd.util.profiler import phase

Events = tuple[Any, Any]  # of a device: at the beginning and the end of a block
_profiled = torch.autograd._profiler_enabled
ENOUGH = 1 << 20  # bytes, from which on a transfer's bandwidth is worth remembering


@dataclass
class Timings:
    """seconds, counts: by kind of work. phases: seconds of the plan's phases (see `Plan.phases`). firsts: of each kind
    of work, the seconds of the first time, and the number of times. parts: seconds of what is a part of some work.
    device: an accelerator that tells the time of its own work, by events on its stream: the host only launches it."""

    device: torch.device | None = None
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: Counter = field(default_factory=Counter)
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    firsts: dict[str, tuple[float, int]] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _timers: dict[str, Timer] = field(default_factory=dict)
    _part_timers: dict[str, Timer] = field(default_factory=dict)
    _waiting: list[tuple[Timer, Events]] = field(default_factory=list)  # blocks that the device has not timed yet
    _spare: list[Events] = field(default_factory=list)

    def settle(self) -> None:
        """Take note of what the device has timed so far, and wait for it."""
        if self._waiting:
            self._waiting[-1][1][1].synchronize()  # events of one stream: the others have come to pass
        for timer, (begin, end) in self._waiting:
            timer.add(begin.elapsed_time(end) / 1e3)
            self._spare.append((begin, end))
        self._waiting.clear()

    def _timer(self, seconds: dict[str, float], name: str, firsts: dict[str, tuple[float, int]] | None = None) -> Timer:
        if self.device is None or self.device.type == "cpu":
            return Timer(seconds, name, firsts)
        return EventTimer(seconds, name, firsts, self.device, self._waiting, self._spare)

    def timed(self, work: str) -> Timer:
        """Adds the seconds of a block to those of this kind of work."""
        if work not in self._timers:
            self._timers[work] = self._timer(self.seconds, work, self.firsts)
        return self._timers[work]

    def part(self, kind: str) -> Timer:
        """Adds the seconds of a block to those of a kind that is a part of some work."""
        if kind not in self._part_timers:
            self._part_timers[kind] = self._timer(self.parts, kind, self.firsts)
        return self._part_timers[kind]

    def phase(self, name: str) -> Timer:
        """Adds the seconds of a block to those of a phase of the plan."""
        return self._timer(self.phases, name)

    def move(self, seconds: float, work: str, other: str) -> None:
        """Of what was last added to a kind of work, so many seconds belong to another one; of a device at most all of
        them: it may have been busy with earlier work while the host was not."""
        self.settle()
        seconds = min(seconds, self._timers[work].last) if work in self._timers else seconds
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
        self.seconds, self.name, self.firsts, self.last = seconds, name, firsts, 0.0
        self.mark: contextlib.AbstractContextManager | None = None

    def __enter__(self) -> None:
        if _profiled():
            self.mark = phase(self.name)
            if self.mark is not None:
                self.mark.__enter__()
        self.start = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        self.add(time.perf_counter() - self.start)
        if self.mark is not None:
            self._unmark(*error)

    def _unmark(self, *error: Any) -> None:
        mark, self.mark = self.mark, None
        if mark is not None:
            mark.__exit__(*error)

    def add(self, seconds: float) -> None:
        self.last = seconds
        self.seconds[self.name] += seconds
        if self.firsts is not None:
            known = self.firsts.get(self.name)
            self.firsts[self.name] = (seconds, 1) if known is None else (known[0], known[1] + 1)


class EventTimer(Timer):
    """A timer of what a block launches on a device. waiting: where its blocks are put. spare: events to use again."""

    def __init__(
        self,
        seconds: dict[str, float],
        name: str,
        firsts: dict[str, tuple[float, int]] | None,
        device: torch.device,
        waiting: list[tuple[Timer, Events]],
        spare: list[Events],
    ):
        super().__init__(seconds, name, firsts)
        self.module, self.device, self.waiting, self.spare = torch.get_device_module(device), device, waiting, spare

    def __enter__(self) -> None:
        super().__enter__()
        event = functools.partial(self.module.Event, enable_timing=True)
        self.events = self.spare.pop() if self.spare else (event(), event())
        self.events[0].record(self.module.current_stream(self.device))

    def __exit__(self, *error: Any) -> None:
        self.events[1].record(self.module.current_stream(self.device))
        self.waiting.append((self, self.events))
        self._unmark(*error)
