"""The shapes of plans that the search considers, many at once, and a lower bound on the time that each of them takes.

Which shapes there are depends on the chain and on the computation, and neither on the budget nor on the tiers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, isqrt

import numpy as np
from numpy.typing import NDArray

from mgd.plan.budget import Costs, Sizes

Numbers = NDArray[np.float64]

#: All numbers up to `DENSE` are considered, and from there on each is larger than the one before by this factor.
DENSE, GROWTH, INNER_GROWTH = 48, 1.05, 1.3

#: Inner snapshots that save updates for less than this share of the computation are not worth their memory.
WORTH = 0.005


@dataclass(frozen=True)
class Shapes:
    """Lengths of segments, and numbers of outer and of inner snapshots: an array of each. inner: None if it is open."""

    length: Numbers
    outer: Numbers
    inner: Numbers | None = None

    def __getitem__(self, some: NDArray[np.int64]) -> Shapes:
        return Shapes(self.length[some], self.outer[some], None if self.inner is None else self.inner[some])

    def refined(self, costs: Costs) -> Shapes:
        """All shapes of these lengths and outer snapshots."""
        inner = [inners(int(length), costs) for length in self.length]
        times = [len(some) for some in inner]
        return Shapes(np.repeat(self.length, times), np.repeat(self.outer, times), np.concatenate(inner))


@lru_cache(maxsize=8)
def open_shapes(chain: int) -> Shapes:
    """Every segment length with every number of outer snapshots."""
    few = {-(-chain // n) for n in range(1, DENSE + 1)}
    lengths = sorted({*few, *_numbers(chain, GROWTH), *(chain - x for x in _numbers(chain - 1, GROWTH))})
    outer = [_outers(-(-chain // length)) for length in lengths]
    return Shapes(np.repeat(np.array(lengths, float), [len(some) for some in outer]), np.concatenate(outer))


def full_logs(chain: int) -> Shapes:
    """One segment, which is the whole chain."""
    return Shapes(np.array([float(chain)]), np.zeros(1))


def _outers(segments: int) -> Numbers:
    """Numbers of outer snapshots. With one for each segment but the last, none is replayed twice."""
    if segments == 1:
        return np.zeros(1)
    return np.array(sorted({*_numbers(segments - 1, GROWTH), segments - 1}), float)


def inners(length: int, costs: Costs) -> Numbers:
    """Numbers of inner snapshots: up to those with which each step is updated at most once.

    More of them save one update each. They are considered as far as updates take a share of the computation.
    """
    if length == 1:
        return np.zeros(1)
    most = ceil((isqrt(8 * length + 1) - 3) / 2)  # the least c with (c + 1) (c + 2) / 2 >= length
    if costs.update > 0:
        most = max(most, ceil(length - 1 - WORTH * (costs.step + costs.hvp) / costs.update * length))
    most = max(1, min(most, length - 1))
    return np.array(sorted({*_numbers(most, INNER_GROWTH), most}), float)


def _numbers(most: int, growth: float) -> list[int]:
    numbers = list(range(1, min(most, DENSE if growth == GROWTH else 4) + 1))
    while numbers and (following := max(numbers[-1] + 1, int(numbers[-1] * growth))) <= most:
        numbers.append(following)
    return numbers


@dataclass(frozen=True)
class Bound:
    """A lower bound on the seconds of any layout of a shape: all its work, and the traffic that each tier can take."""

    chain: int
    sizes: Sizes
    limits: Mapping[str, int]
    costs: Costs
    stop_at: int = 0

    def __call__(self, shapes: Shapes) -> Numbers:
        """Infinite where a shape does not fit."""
        N, costs, state, grad = self.chain, self.costs, self.sizes.snapshot, self.sizes.gradient
        length, outer = shapes.length, shapes.outer
        n = np.ceil(N / length)
        first = N - (n - 1) * length
        turns, part = _Revolve(n, outer), _Revolve(first, first - 1)
        replayed = np.where(n > 1, length * turns.advances - (length - first) * turns.r + 1 - n, 0.0)
        inner = np.minimum(1, length - 1) if shapes.inner is None else shapes.inner
        held = state * (outer + inner) + grad * (length - 1)
        updates = passing = rising = 0.0
        if shapes.inner is not None:
            part, whole = _Revolve(first, np.minimum(inner, first - 1)), _Revolve(length, inner)
            updates = (n - 1) * whole.updates + part.updates
            # Of the snapshots of a pass that logs, that of the start may be an outer one.
            passing = np.maximum(0, n - 2) * np.maximum(0, inner - 1)
            rising = (n - 1) * whole.saved_again
        logged, loads = N - n, N - n
        seconds = self._phase(costs.step * (self.stop_at + N), 1, held)
        seconds = seconds + self._phase(
            costs.step * replayed,
            n - 1,
            grad * np.maximum(0, logged - (length - 1)) + state * passing,
            state * turns.saved_again,
            state * turns.loads,
        )
        work = costs.step * (n - 1) + costs.update * updates + costs.hvp * N
        seconds = seconds + self._phase(work, n, grad * logged, state * rising, state * loads + grad * updates, "read")
        work = work + costs.step * (self.stop_at + N + replayed)
        saved = passing + inner + rising + outer + turns.saved_again
        seconds = np.maximum(seconds, self._copies(work, n, grad * logged, grad * updates, state * saved, state * (loads + turns.loads)))
        return np.where(held <= sum(self.limits.values()), seconds * (1 - 1e-9), np.inf)

    def _copies(self, work: Numbers, times: Numbers, log: Numbers, updates: Numbers, saved: Numbers, loaded: Numbers) -> Numbers:
        """At least the seconds of all phases' work and copies.

        What is written to a tier is read from it, at least once. Of the log, a tier takes its room so many times.
        """
        costs = self.costs
        write, read = ({t: 1 / (costs.copy if t in costs.overlap else of[t]) for t in self.limits} for of in (costs.write, costs.read))
        both = {tier: write[tier] + read[tier] for tier in self.limits}
        busy = work + saved * min(both.values()) + (np.maximum(0, loaded - saved) + updates) * min(read.values())
        for tier in sorted(both, key=both.__getitem__):
            here = np.minimum(log, times * self.limits[tier])
            busy, log = busy + here * both[tier], log - here
        return busy

    def _phase(
        self, work: Numbers, times: Numbers, log: Numbers, write: Numbers = 0.0, read: Numbers = 0.0, way: str = "write"
    ) -> Numbers:
        """At least the seconds of the work, and of moving the log and these bytes.

        Of the log, which moves `way`, a tier takes its room so many times. The rest may all be on the best tier.
        """
        costs = self.costs
        rates = costs.write if way == "write" else costs.read
        copying = {t: 1 / (costs.copy if t in costs.overlap else rates[t]) for t in self.limits}
        others = [
            min(1 / (costs.copy if t in costs.overlap else of[t]) for t in self.limits)
            for of in (costs.write, costs.read)
        ]
        busy, left = work + write * others[0] + read * others[1], log
        for tier in sorted(copying, key=copying.__getitem__):
            here = np.minimum(left, times * self.limits[tier])
            busy, left = busy + here * copying[tier], left - here
        beside = np.zeros_like(busy)
        parallel = [tier for tier in self.limits if tier in costs.overlap]
        for some in (c for k in range(len(parallel)) for c in itertools.combinations(parallel, k + 1)):
            rate = sum(rates[tier] for tier in some)
            elsewhere = sum(room for tier, room in self.limits.items() if tier not in some)
            beside = np.maximum(beside, (log - times * elsewhere) / rate)
        if len(parallel) == len(self.limits):
            beside = np.maximum(beside, (log + (write if way == "write" else read)) / rate)
        return np.maximum(busy, beside)


class _Revolve:
    """Arrays of what the revolve schedules of n steps with s snapshots do."""

    def __init__(self, n: Numbers, s: Numbers):
        s = np.maximum(1, s)
        r, reach = np.ones_like(n), s + 1.0
        one, two = s == 1, s == 2
        r[one], reach[one] = np.maximum(1, n[one] - 1), np.maximum(2, n[one])
        r[two] = np.maximum(1, np.ceil((np.sqrt(8 * n[two] + 1) - 3) / 2))
        reach[two] = (r[two] + 1) * (r[two] + 2) / 2
        short = np.flatnonzero(reach < n)
        while len(short):
            r[short] += 1
            reach[short] *= (s[short] + r[short]) / r[short]
            short = short[reach[short] < n[short]]
        some = n > 1
        self.r = np.where(some, r, 0.0)
        self.advances = np.where(some, r * (n - reach / (s + 1)), 0.0)
        self.updates = np.where(some, self.advances - (n - 1), 0.0)
        self.loads = np.where(some, n - 1, 0.0)
        before = reach * r / (s + r)
        saves = np.maximum(before * s / (s + r - 1), n - before)
        self.saved_again = np.where(some, np.maximum(0, saves - s), 0.0)
