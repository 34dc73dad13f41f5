"""Counts of what a reversal does, by the depth of the snapshots and by tier, without making its moves."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mgd.plan.reversal import Revolve, Rule
from mgd.plan.revolve import advances, run, split

Counts: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Slots:
    """Snapshot slots by tier, fastest first. The top of the stack, which is used most often, gets the fastest ones."""

    counts: tuple[int, ...]

    @cached_property
    def total(self) -> int:
        return sum(self.counts)

    def fastest(self, count: int) -> Slots:
        """The `count` fastest slots."""
        counts = []
        for available in self.counts:
            counts.append(min(count, available))
            count -= counts[-1]
        return Slots(tuple(counts))

    def tier(self, depth: int) -> int:
        """The index of the tier that holds the snapshot at `depth`."""
        above = self.total - 1 - depth
        for i, count in enumerate(self.counts):
            if above < count:
                return i
            above -= count
        raise IndexError(f"depth {depth} of {self.total} slots")

    def between(self, low: int, high: int) -> tuple[int, ...]:
        """How many of the slots of depths low..high-1 are on each tier."""
        top, counts = self.total, []
        for count in self.counts:
            counts.append(max(0, min(high, top) - max(low, top - count)))
            top -= count
        return tuple(counts)


@dataclass(frozen=True)
class Tally:
    """What a reversal does: its advances and, by tier, its saves, its loads, and its turns at a snapshot (`held`)."""

    advances: int
    saves: tuple[int, ...]
    loads: tuple[int, ...]
    held: tuple[int, ...]


class Profile(Protocol):
    """What a reversal does: its advances, and what it does with the snapshots of each depth."""

    @property
    def advances(self) -> int: ...

    def below(self, depths: Counts) -> tuple[Counts, Counts, Counts]:
        """The saves, loads and turns of all snapshots below these depths."""
        ...


def profile(n: int, rule: Rule) -> Profile:
    """Count the moves of `reversal(n, rule)` without making them."""
    return binomial(n, rule.root) if isinstance(rule, Revolve) else counted(n, rule)


# --- trees: each different block of a depth is counted once ----------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """depths: those where anything changes, from 0 on. sums: for each of them, how often the snapshots of all lower
    depths are saved, loaded, and turned at; in between these sums are linear.
    """

    advances: int
    depths: Counts
    sums: Counts

    def below(self, depths: Counts) -> tuple[Counts, Counts, Counts]:
        saves, loads, held = (np.rint(np.interp(depths, self.depths, row)).astype(np.int64) for row in self.sums)
        return saves, loads, held


@lru_cache(maxsize=256)
def counted(n: int, rule: Rule) -> Counted:
    advances = 0
    changes: dict[int, list[int]] = {0: [0, 0, 0]}

    def add(low: int, high: int, saves: int, loads: int, held: int) -> None:
        """So many of each at every depth of low..high-1."""
        if low < high:
            for depth, sign in ((low, 1), (high, -1)):
                change = changes.setdefault(depth, [0, 0, 0])
                change[0] += sign * saves
                change[1] += sign * loads
                change[2] += sign * held

    level, depth = ({(n, rule.root): 1} if n > 1 else {}), 0
    if n > 1:
        add(0, 1, 1, 0, 0)
    while level:
        deeper: dict[tuple[int, int], int] = {}
        while level:
            length, label = block = max(level)
            times = level.pop(block)
            if rule.keeps_all(length, label):
                advances += times * (length - 1)
                add(depth + 1, depth + length - 1, times, 0, 0)
                add(depth, depth + length - 1, 0, times, times)
            else:
                m, left, right = rule.divide(length, label)
                advances += times * m
                add(depth, depth + 1, 0, times, times * (m == 1))
                if m > 1:
                    level[m, left] = level.get((m, left), 0) + times
                if length - m > 1:
                    add(depth + 1, depth + 2, times, 0, 0)
                    deeper[length - m, right] = deeper.get((length - m, right), 0) + times
        level, depth = deeper, depth + 1

    depths = np.array(sorted(changes), dtype=np.int64)
    rates = np.cumsum([changes[d] for d in depths.tolist()], axis=0)
    sums = np.zeros((3, len(depths)), dtype=np.int64)
    sums[:, 1:] = np.cumsum(rates[:-1] * np.diff(depths)[:, None], axis=0).T
    return Counted(advances, depths, sums)


# --- revolve: sums of binomials --------------------------------------------------------------------------------------


class Binomials:
    """Two sums of multiples of β(max(D - depth, least), r) for snapshots below depth D: of saves and of loads."""

    def __init__(self) -> None:
        self._times: dict[tuple[int, int, int], list[int]] = {}

    def add(self, kind: int, times: int, depth: int, least: int, r: int) -> None:
        self._times.setdefault((r, depth, least), [0, 0])[kind] += times

    def telescope(self, kind: int, depth: int, least: int, r: int, count: int) -> None:
        self.add(kind, 1, depth, least, r)
        self.add(kind, -1, depth + count, least, r)

    def arrays(self) -> tuple[tuple[int, Counts, Counts, NDArray[np.float64]], ...]:
        """For each r: depths and least numbers, [terms, 1], and times, [2, terms]."""
        arrays = []
        for r, some in itertools.groupby(sorted(self._times), key=operator.itemgetter(0)):
            keys = list(some)
            _, depths, least = np.array(keys).T[:, :, None]
            arrays.append((r, depths, least, np.array([self._times[key] for key in keys], dtype=float).T))
        return tuple(arrays)


SAVES, LOADS = 0, 1


@dataclass(frozen=True, eq=False)
class Binomial:
    """A chain's own snapshot at depth 0 is saved once, and every snapshot is turned at once: turns are saves.

    Let x = D - d for a block that begins at depth d. Below depth D, a block β(s, r) loads β(x, r) - 1 times and saves,
    beside its own start, β(x-1, r) - 1 times; a block γ(s, r) loads γ(x, r) - 1 and saves β(x-1, r-1) - 1 times. Over a
    `Run` of blocks these telescope.
    """

    advances: int
    terms: tuple[tuple[int, Counts, Counts, NDArray[np.float64]], ...]

    def below(self, depths: Counts) -> tuple[Counts, Counts, Counts]:
        different, where = np.unique(depths, return_inverse=True)
        total = np.zeros((2, len(different)))
        for r, starts, least, times in self.terms:
            total += times @ _reach(np.maximum(different - starts, least), r)
        saves, loads = np.rint(total).astype(np.int64)[:, where.reshape(depths.shape)]
        return saves, loads, saves


@lru_cache(maxsize=4096)
def binomial(n: int, s: int) -> Binomial:
    """What revolve does with n steps and s snapshots."""
    total, depth, terms = advances(n, s), 0, Binomials()
    if n > 1:
        terms.telescope(SAVES, 0, 0, 1, 1)
    while n > 1:
        if n <= s + 1:
            terms.telescope(SAVES, depth + 1, 0, 1, n - 2)
            terms.telescope(LOADS, depth, 0, 1, n - 1)
            break
        if s == 1:
            terms.add(LOADS, n - 1, depth, 0, 1)
            terms.add(LOADS, 1 - n, depth + 1, 0, 1)
            break
        count, gamma, r = row = run(n, s)
        below = r - 1 if gamma else r
        if count:
            terms.telescope(SAVES, depth + 1, 0, below, count)
            terms.telescope(LOADS, depth, 0, below, count)
            if gamma:
                terms.telescope(LOADS, depth + 1, -1, below, count)
            n -= row.block(s, r) - row.block(s - count, r)
            s, depth = s - count, depth + count
        else:
            terms.add(SAVES, 1, depth + 2, -1, r - 1)
            terms.add(LOADS, 1, depth + 1, -1, r - 1)
            if gamma:
                terms.add(LOADS, 1, depth + 2, -1, r - 1)
            n = split(n, s)
    return Binomial(total, terms.arrays())


def _reach(x: Counts, r: int) -> NDArray[Any]:
    """β(x, r), and 0 for x = -1. Exact below 2**50."""
    most = int(x.max(initial=0))
    if r > 3 and most < 1000:
        of = np.ones(most + 2)
        of[1:-1] += r / np.arange(1, most + 1)
        of[-1] = 0.0  # that of -1
        return np.cumprod(of)[x]
    product = 1.0 + x
    for i in range(2, r + 1):
        product *= 1 + x / i
    return product


def tally(n: int, rule: Rule, slots: Slots) -> Tally:
    """Count the moves of `reversal(n, rule)` by tier."""
    done = profile(n, rule)
    top = slots.total - np.cumsum((0, *slots.counts))
    by_tier = (tuple((row[:-1] - row[1:]).tolist()) for row in done.below(top))
    return Tally(done.advances, *by_tier)
