"""The shapes of plans that the search considers, many at once, and a lower bound on the time that each of them takes.

Which shapes there are depends on the chain and on the computation, and neither on the budget nor on the tiers.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil, inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mgd.plan.budget import Costs, Sizes
from mgd.plan.revolve import reach

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Which numbers are tried: all up to `dense`, then each larger than the one before by a factor."""

    dense: int
    growth: float

    def __call__(self, most: int) -> list[int]:
        """Numbers from 1 to `most`, with both ends."""
        numbers = list(range(1, min(most, self.dense) + 1))
        while numbers and (following := max(numbers[-1] + 1, int(numbers[-1] * self.growth))) <= most:
            numbers.append(following)
        return numbers if not numbers or numbers[-1] == most else [*numbers, most]


#: For lengths of segments and for outer snapshots, and for inner ones: a first search, then one near the best it found.
COARSE, COARSE_INNER = Grid(40, 1.2), Grid(12, 1.3)
FINE, FINE_INNER = Grid(40, 1.03), Grid(12, 1.1)
NEAR = 1.25


@dataclass(frozen=True)
class Shapes:
    """Lengths of segments, and numbers of outer and of inner snapshots: an array of each. chain: of how many steps."""

    chain: int
    length: Numbers
    outer: Numbers
    inner: Numbers

    def __getitem__(self, some: NDArray[np.int64] | NDArray[np.bool_]) -> Shapes:
        return Shapes(self.chain, self.length[some], self.outer[some], self.inner[some])

    @cached_property
    def ample(self) -> NDArray[np.bool_]:
        """Whether there are more inner snapshots than `thrifty`."""
        return self.inner * (self.inner + 1) / 2 >= np.maximum(2, self.length)

    @cached_property
    def segments(self) -> Numbers:
        return np.ceil(self.chain / self.length)

    @cached_property
    def first(self) -> Numbers:
        """The length of the first segment."""
        return self.chain - (self.segments - 1) * self.length

    @cached_property
    def turns(self) -> _Revolve:
        """The schedule of the chain of segments."""
        return _Revolve(self.segments, self.outer)

    @cached_property
    def inside(self) -> tuple[_Revolve, _Revolve]:
        """The schedules of the first segment, and of each other one."""
        return _Revolve(self.first, np.minimum(self.inner, self.first - 1)), _Revolve(self.length, self.inner)

    @cached_property
    def counts(self) -> Numbers:
        """What each shape does, [8, shapes]; the rows are those of `Counts`."""
        n, length, inner, turns = self.segments, self.length, self.inner, self.turns
        part, whole = self.inside
        return np.stack(
            [
                n,
                length,
                self.outer,
                inner,
                np.where(n > 1, length * turns.advances - (length - self.first) * turns.r + 1 - n, 0.0),
                (n - 1) * whole.updates + part.updates,
                turns.saved_again,
                (n - 1) * whole.saved_again,
            ]
        )

    @classmethod
    def of(cls, chain: int, lengths: Iterable[int], outer: Grid, inner: Grid) -> Shapes:
        """Segments of these lengths, with all numbers of outer and inner snapshots of the grids."""
        rows = []
        for length in lengths:
            segments = -(-chain // length)
            outers = sorted({*outer(segments - 1), *fewest_saves(segments)}) or [0]
            inners = sorted({*inner(length - 1), *fewest_saves(length), thrifty(length)})
            pair = np.meshgrid(outers, inners, indexing="ij")
            rows.append(np.stack([np.full(pair[0].shape, length), *pair]).reshape(3, -1))
        return cls(chain, *np.concatenate(rows, axis=1).astype(float))


class Counts(NamedTuple):
    """replayed, updates: steps. again: saves of outer snapshots after the first sweep. rising: saves of inner ones
    after a segment's first pass."""

    segments: Numbers
    length: Numbers
    outer: Numbers
    inner: Numbers
    replayed: Numbers
    updates: Numbers
    again: Numbers
    rising: Numbers


@lru_cache(maxsize=8)
def coarse(chain: int) -> Shapes:
    """Shapes of every kind."""
    numbers = COARSE(chain)
    equal = (-(-chain // n) for n in numbers)
    lengths = sorted({*numbers, *equal, *(chain - x for x in numbers[:-1])})
    return Shapes.of(chain, lengths, COARSE, COARSE if every(chain) else COARSE_INNER)


def every(chain: int) -> bool:
    """Whether `coarse` has all shapes."""
    return chain <= COARSE.dense


def near(chain: int, length: int, outer: int, inner: int) -> Shapes:
    """Finer steps around these numbers."""
    lengths = {*_around(length, chain), *(-(-chain // n) for n in _around(-(-chain // length), chain))}
    shapes = Shapes.of(chain, sorted(lengths), FINE, FINE_INNER)
    most = shapes.outer == shapes.segments - 1
    return shapes[(most | _close(shapes.outer, outer)) & _close(shapes.inner, inner)]


def _close(numbers: Numbers, number: int) -> NDArray[np.bool_]:
    return (numbers * NEAR + 1 >= number) & (numbers <= number * NEAR + 1)


def full_logs(chain: int) -> Shapes:
    """One segment, which is the whole chain."""
    return Shapes.of(chain, [chain], FINE, FINE_INNER)


def _around(number: int, most: int) -> list[int]:
    return [x for x in FINE(min(most, ceil(number * NEAR))) if x * NEAR >= number]


def thrifty(length: int) -> int:
    """The inner snapshots with which no step of a segment is updated twice. Each further one saves one update."""
    return min(length - 1, least_slots(length, lambda s: reach(s, 2)))


@lru_cache(maxsize=1 << 14)
def fewest_saves(n: int) -> list[int]:
    """The numbers of snapshots with which n steps take the fewest saves: the ends of γ in `mgd.plan.revolve.split`."""
    numbers = (least_slots(n, lambda s, r=r: reach(s, r) + reach(s - 1, r)) for r in (1, 2, 3))  # type: ignore[misc]
    return [x for s in numbers for x in (s - 1, s) if 1 <= x < n]


def least_slots(n: int, longest: Callable[[int], int]) -> int:
    """The fewest snapshots, at least one, whose longest chain is n steps or more."""
    return 1 + bisect_left(range(1, max(2, n)), n, key=longest)


@dataclass(frozen=True)
class Bound:
    """A lower bound on the seconds of any layout of a shape: all its work, and the traffic that each tier can take."""

    chain: int
    sizes: Sizes
    limits: Mapping[str, int]
    costs: Costs
    stop_at: int = 0

    def __call__(self, shapes: Shapes, best: float = inf) -> Numbers:
        """Infinite where a shape does not fit, or where its work alone takes `best` seconds."""
        every = Counts(*shapes.counts)
        held = self.sizes.snapshot * (every.outer + every.inner) + self.sizes.gradient * (every.length - 1)
        training, replaying, reversing = self._work(every, held)
        bounds = np.full(len(held), inf)
        some = np.flatnonzero((held <= sum(self.limits.values())) & (training + replaying + reversing < best))
        if len(some):
            bounds[some] = self._bounds(Counts(*shapes.counts[:, some]), held[some]) * (1 - 1e-9)
        return bounds

    def _work(self, of: Counts, held: Numbers) -> tuple[float, Numbers, Numbers]:
        """Seconds of the first sweep, the replays and the reverse sweep, without traffic."""
        costs = self.costs
        reverse = costs.step * (of.segments - 1) + costs.update * of.updates + costs.hvp * self.chain
        if self.sizes.residuals:
            reverse = reverse - (costs.hvp - costs.hvp_kept) * self._with_residuals(of, held)
        return costs.step * (self.stop_at + self.chain), costs.step * of.replayed, reverse

    def _with_residuals(self, of: Counts, held: Numbers) -> Numbers:
        """At most so many steps are reversed with residuals."""
        memory = self.limits.get(self.sizes.memory, 0)
        elsewhere = sum(self.limits.values()) - memory
        kept = np.floor((memory - np.maximum(0, held - elsewhere)) / self.sizes.residuals)
        kept = np.maximum(0, np.minimum(kept, of.length))
        return np.minimum(self.chain, of.segments * (kept + 1))

    def _bounds(self, of: Counts, held: Numbers) -> Numbers:
        N, state, grad = self.chain, self.sizes.snapshot, self.sizes.gradient
        n, inner = of.segments, of.inner
        training, replaying, reversing = self._work(of, held)
        # Of the snapshots of a pass that logs, that of the start may be an outer one.
        passing = np.maximum(0, n - 2) * np.maximum(0, inner - 1)
        logged = loads = N - n
        turned = n - 1  # loads of outer snapshots
        first = self._phase(training, 1, held)
        again = grad * np.maximum(0, logged - (of.length - 1)) + state * passing
        replay = self._phase(replaying, turned, again, state * of.again, state * turned)
        reads = state * loads + grad * of.updates
        reverse = self._phase(reversing, n, grad * logged, state * of.rising, reads, "read")
        # What the training leaves is read at least once.
        reads = np.maximum(0, grad * logged + reads + state * turned - held)
        writes = again + state * (of.again + of.rising)
        after = self._phase(reversing + replaying, 1, held, writes, reads, "read")
        seconds = first + np.maximum(replay + reverse, after)
        work = training + replaying + reversing
        saved = passing + inner + of.rising + of.outer + of.again
        copies = self._copies(work, n, grad * logged, grad * of.updates, state * saved, state * (loads + turned))
        return np.maximum(seconds, copies)

    def _copies(
        self,
        work: Numbers | float,
        times: Numbers | int,
        log: Numbers,
        updates: Numbers,
        saved: Numbers,
        loaded: Numbers,
    ) -> Numbers:
        """At least the seconds of all phases' work and copies.

        What is written to a tier is read from it, at least once. Of the log, a tier takes its room so many times.
        """
        costs = self.costs
        write, read = (
            {t: 1 / (costs.copy if t in costs.overlap else of[t]) for t in self.limits}
            for of in (costs.write, costs.read)
        )
        both = {tier: write[tier] + read[tier] for tier in self.limits}
        busy = work + saved * min(both.values()) + (np.maximum(0, loaded - saved) + updates) * min(read.values())
        for tier in sorted(both, key=both.__getitem__):
            here = np.minimum(log, times * self.limits[tier])
            busy, log = busy + here * both[tier], log - here
        return busy

    def _phase(
        self,
        work: Numbers | float,
        times: Numbers | int,
        log: Numbers,
        write: Numbers | float = 0.0,
        read: Numbers | float = 0.0,
        way: str = "write",
    ) -> Numbers:
        """At least the seconds of the work, and of moving the log and these bytes.

        Of the log, which moves `way`, a tier takes its room so many times. The rest may all be on the best tier.
        """
        costs = self.costs
        rates = costs.write if way == "write" else costs.read
        copying = {t: 1 / (costs.copy if t in costs.overlap else rates[t]) for t in self.limits}
        least = [
            min(1 / (costs.copy if t in costs.overlap else of[t]) for t in self.limits)
            for of in (costs.write, costs.read)
        ]
        busy, left = work + write * least[0] + read * least[1], log
        for tier in sorted(copying, key=copying.__getitem__):
            here = np.minimum(left, times * self.limits[tier])
            busy, left = busy + here * copying[tier], left - here
        beside: Numbers = np.zeros_like(busy)
        parallel = [tier for tier in self.limits if tier in costs.overlap]
        for some in (c for k in range(len(parallel)) for c in itertools.combinations(parallel, k + 1)):
            rate = sum(rates[tier] for tier in some)
            elsewhere = sum(room for tier, room in self.limits.items() if tier not in some)
            beside = np.maximum(beside, (log - times * elsewhere) / rate)
        if len(parallel) == len(self.limits):
            moved, others = (log + write, read) if way == "write" else (log + read, write)
            back = costs.read if way == "write" else costs.write
            fastest, fastest_back = (max(of[tier] for tier in parallel) for of in (rates, back))
            both = (moved / fastest + others / fastest_back) / len(parallel)
            beside = np.maximum(beside, np.maximum(moved / rate, both))
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
        before = reach * r / (s + r)
        saves = np.maximum(before * s / (s + r - 1), n - before)
        self.saved_again = np.where(some, np.maximum(0, saves - s), 0.0)
