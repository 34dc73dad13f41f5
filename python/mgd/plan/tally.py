"""Counts of what a reversal does, by tier, without making its moves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mgd.plan.reversal import Revolve, Rule


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


def tally(n: int, rule: Rule, slots: Slots) -> Tally:
    """Count the moves of `reversal(n, rule)` without making them: each different block is counted once."""
    tiers = len(slots.counts)
    if n == 1:
        return Tally(0, (0,) * tiers, (0,) * tiers, (0,) * tiers)
    # Per node: its advances, then its saves, loads and held turns by tier, without the save of its own start.
    nodes: dict[tuple[int, int, int], list[int]] = {}
    root = (n, rule.root, 0)
    pending = [root]
    while pending:
        node = length, label, depth = pending[-1]
        if node in nodes:
            pending.pop()
            continue
        if rule.keeps_all(length, label):
            nodes[node] = _all_saved(length, depth, slots)
            continue
        if isinstance(rule, Revolve) and (label == 1 or length <= 2 * label + 1):
            nodes[node] = _single(length, depth, slots) if label == 1 else _paired(length, label, depth, slots)
            continue
        m, left, right = rule.divide(length, label)
        parts = [(m, left, depth)] * (m > 1) + [(length - m, right, depth + 1)] * (length - m > 1)
        if missing := [part for part in parts if part not in nodes]:
            pending.extend(missing)
            continue
        total = [sum(column) for column in zip(*(nodes[part] for part in parts), strict=True)] or [0] * (1 + 3 * tiers)
        total[0] += m
        if length - m > 1:
            total[1 + slots.tier(depth + 1)] += 1
        total[1 + tiers + slots.tier(depth)] += 1
        if m == 1:
            total[1 + 2 * tiers + slots.tier(depth)] += 1
        nodes[node] = total
    counts = nodes[root]
    counts[1 + slots.tier(0)] += 1
    by_tier = [tuple(counts[1 + i * tiers : 1 + (i + 1) * tiers]) for i in range(3)]
    return Tally(counts[0], *by_tier)


def _all_saved(length: int, depth: int, slots: Slots) -> list[int]:
    """A chain that saves every state."""
    visited = slots.between(depth, depth + length - 1)
    return [length - 1, *slots.between(depth + 1, depth + length - 1), *visited, *visited]


def _single(length: int, depth: int, slots: Slots) -> list[int]:
    """A chain with one snapshot, which starts over for every step."""
    here = slots.between(depth, depth + 1)
    return [length * (length - 1) // 2, *(0 for _ in here), *(x * (length - 1) for x in here), *here]


def _paired(length: int, s: int, depth: int, slots: Slots) -> list[int]:
    """A chain of s + 1 < length <= 2 s + 1: `split` takes two steps at a time until all states of the rest fit."""
    pairs = length - s - 1
    rest, top = length - 2 * pairs, depth + pairs
    tail = _all_saved(rest, top, slots)
    saves = slots.between(depth + 1, top + (rest > 1))
    turns = slots.between(depth, top)
    return [x + y for x, y in zip([3 * pairs, *saves, *(2 * x for x in turns), *turns], tail, strict=True)]
