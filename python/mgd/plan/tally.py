"""Counts of what a reversal does, by the depth of the snapshots and by tier, without making its moves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mgd.plan.reversal import Revolve, Rule

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


@dataclass(frozen=True)
class Profile:
    """What a reversal does: its advances, and what it does with the snapshots of each depth.

    depths: those where anything changes, from 0 on. sums: for each of them, how often the snapshots of all lower depths
    are saved, loaded, and turned at (`held`); in between these sums are linear.
    """

    advances: int
    depths: Counts
    sums: Counts

    def below(self, depths: Counts) -> tuple[Counts, Counts, Counts]:
        """The saves, loads and turns of all snapshots below these depths."""
        saves, loads, held = (np.rint(np.interp(depths, self.depths, row)).astype(np.int64) for row in self.sums)
        return saves, loads, held


@lru_cache(maxsize=4096)
def profile(n: int, rule: Rule) -> Profile:
    """Count the moves of `reversal(n, rule)` without making them: each different block of a depth is counted once."""
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
            elif isinstance(rule, Revolve) and label == 1:  # one snapshot: start over for every step
                advances += times * (length * (length - 1) // 2)
                add(depth, depth + 1, 0, times * (length - 1), times)
            elif isinstance(rule, Revolve) and length <= 2 * label + 1:  # two steps at a time until the rest fits
                pairs = length - label - 1
                rest, top = length - 2 * pairs, depth + pairs
                advances += times * (3 * pairs + rest - 1)
                add(depth + 1, top + (rest > 1), times, 0, 0)
                add(depth, top, 0, 2 * times, times)
                add(top + 1, top + rest - 1, times, 0, 0)
                add(top, top + rest - 1, 0, times, times)
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
    return Profile(advances, depths, sums)


def tally(n: int, rule: Rule, slots: Slots) -> Tally:
    """Count the moves of `reversal(n, rule)` by tier."""
    done = profile(n, rule)
    top = slots.total - np.cumsum((0, *slots.counts))
    by_tier = (tuple((row[:-1] - row[1:]).tolist()) for row in done.below(top))
    return Tally(done.advances, *by_tier)
