"""Reversal of a chain of n steps from few snapshots: binomial (revolve) and k-ary schedules.

The chain has positions 0..n. Its steps are turned in the order n-1, ..., 0, and step i is turned at position i.
Positions are reached by advancing, one unit a step, or by loading a snapshot. Each schedule here is a rule that
splits a chain at m: snapshot the start, advance to m, reverse the right part, load the start, reverse the
left part. The rules differ in m, and in how they hand their slots on.

Griewank & Walther 2000 (Algorithm 799) prove that the least number of advances with s snapshots, the
one of the start included, is t(n, s) = r n - C(s+r, s+1), where r is the least with n <= C(s+r, s). Many splits attain
it; `split` picks one that also takes the fewest snapshots, and that cuts a canonical block off the chain, so
that a chain of any length holds only O(s r) different blocks: schedules of millions of steps are counted, not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import comb, isqrt
from typing import NamedTuple, Protocol


def reach(s: int, r: int) -> int:
    """β(s, r) = C(s+r, s): the longest chain that s snapshots reverse with at most r advances of any step."""
    return comb(s + r, s)


def repetitions(n: int, s: int) -> int:
    """The least r with n <= β(s, r)."""
    if n <= 1:
        return 0
    if s == 1:
        return n - 1
    if s == 2:  # n <= (r+1)(r+2)/2
        return (isqrt(8 * n - 7) - 1) // 2
    r, longest = 1, s + 1
    while longest < n:
        r += 1
        longest = longest * (s + r) // r
    return r


def advances(n: int, s: int) -> int:
    """t(n, s): the least number of advances that reverse n steps with s snapshots, the start's included."""
    if n <= 1:
        return 0
    if n <= s + 1:
        return n - 1
    r = repetitions(n, s)
    return r * n - comb(s + r, s + 1)


def saves(n: int, s: int) -> int:
    """The least number of snapshots a schedule of t(n, s) advances takes, over and above the start's."""
    if n <= 1:
        return 0
    r = repetitions(n, s)
    return max(reach(s - 1, r - 1), n - reach(s, r - 1)) - 1


def split(n: int, s: int) -> int:
    """Where to put the next snapshot in a chain of n >= 2 steps, so that `advances` and `saves` are both attained.

    Among the optimal m, whose parts must not exceed r repetitions on the right and r-1 on the left. While
    n <= γ(s, r) = β(s, r-1) + β(s-1, r-1), the fewest snapshots need both parts below their own γ; beyond it, both
    above. Either way one of the parts is taken to be a whole block β or γ.
    """
    r = repetitions(n, s)
    if r == 1:
        return 1
    if n <= _gamma(s, r):
        return min(_gamma(s, r - 1), n - reach(s - 1, r - 1))
    return min(reach(s, r - 1), n - _gamma(s - 1, r))


def _gamma(s: int, r: int) -> int:
    return reach(s, r - 1) + reach(s - 1, r - 1) if s > 0 else 1


class Rule(Protocol):
    """How to split a chain of n steps. A label carries what the rule remembers between splits."""

    @property
    def root(self) -> int:
        """The label of the whole chain."""

    def divide(self, n: int, label: int) -> tuple[int, int, int]:
        """The split m, and the labels of the left and the right part."""

    def keeps_all(self, n: int, label: int) -> bool:
        """Whether every further split is at m = 1, so that every state is kept."""


@dataclass(frozen=True)
class Revolve:
    """The optimum for s snapshots; the label is the number of snapshots at hand."""

    root: int

    def divide(self, n: int, label: int) -> tuple[int, int, int]:
        return split(n, label), label, label - 1

    def keeps_all(self, n: int, label: int) -> bool:
        return n <= label + 1


@dataclass(frozen=True)
class KAry:
    """REPLAY's k-ary tree (arXiv 2503.13751): k children of equal length, down to single steps.

    The label is the number of siblings still to be placed. k = 2 is the logarithmic scheme, k = ceil(sqrt(n)) the
    well-known one of checkpoints every sqrt(n) steps, k >= n keeps every state.
    """

    k: int

    @property
    def root(self) -> int:
        return self.k

    def divide(self, n: int, label: int) -> tuple[int, int, int]:
        children = self.k if label == 1 else label
        return max(1, n // children), self.k, children - 1

    def keeps_all(self, n: int, label: int) -> bool:
        return n <= (self.k if label == 1 else label)


class Move(NamedTuple):
    """One move of a reversal: "save", "load", "advance" or "turn", at position `at`.

    `depth` is the place of the snapshot on the stack of those held. A turn with depth >= 0 is at a snapshot, which
    is not needed again and must now be dropped; with depth -1, at none.
    """

    kind: str
    at: int
    depth: int = -1


def reversal(n: int, rule: Rule) -> Iterator[Move]:
    """The moves that reverse a chain of n steps, from position 0. Memory: the snapshots held, no more."""
    stack = [(0, n, rule.root, 0, False)]
    while stack:
        start, length, label, depth, held = stack.pop()
        if held:
            yield Move("load", start, depth)
        if length == 1:
            yield Move("turn", start, depth if held else -1)
            continue
        if not held:
            yield Move("save", start, depth)
        m, left, right = rule.divide(length, label)
        yield Move("advance", start + m)
        stack.append((start, m, left, depth, True))
        stack.append((start + m, length - m, right, depth + 1, False))


@dataclass(frozen=True)
class Slots:
    """Snapshot slots by tier, fastest first. The stack's top, where traffic is densest, gets the fastest ones."""

    counts: tuple[int, ...]

    @cached_property
    def total(self) -> int:
        return sum(self.counts)

    def fastest(self, count: int) -> Slots:
        taken = []
        for available in self.counts:
            taken.append(min(count, available))
            count -= taken[-1]
        return Slots(tuple(taken))

    def tier(self, depth: int) -> int:
        """Index of the tier that holds the snapshot at `depth`."""
        above = self.total - 1 - depth
        for i, count in enumerate(self.counts):
            if above < count:
                return i
            above -= count
        raise IndexError(f"depth {depth} of {self.total} slots")

    def between(self, low: int, high: int) -> tuple[int, ...]:
        """How many of the slots of depths low..high-1 are on each tier."""
        top, found = self.total, []
        for count in self.counts:
            found.append(max(0, min(high, top) - max(low, top - count)))
            top -= count
        return tuple(found)


@dataclass(frozen=True)
class Tally:
    """What a reversal does: advances, and by tier its saves, its loads, and its turns at a snapshot."""

    advances: int
    saves: tuple[int, ...]
    loads: tuple[int, ...]
    held: tuple[int, ...]


def tally(n: int, rule: Rule, slots: Slots) -> Tally:
    """Counts the moves of `reversal(n, rule)` without making them: each different block is counted once."""
    tiers = len(slots.counts)
    if n == 1:
        return Tally(0, (0,) * tiers, (0,) * tiers, (0,) * tiers)
    # Per node: advances, then saves, loads and held turns by tier, without the save of the node's own start.
    known: dict[tuple[int, int, int], list[int]] = {}
    root = (n, rule.root, 0)
    pending = [root]
    while pending:
        node = length, label, depth = pending[-1]
        if node in known:
            pending.pop()
            continue
        if rule.keeps_all(length, label):
            known[node] = _kept(length, depth, slots)
            continue
        if isinstance(rule, Revolve) and (label == 1 or length <= 2 * label + 1):
            known[node] = _single(length, depth, slots) if label == 1 else _paired(length, label, depth, slots)
            continue
        m, left, right = rule.divide(length, label)
        parts = [(m, left, depth)] * (m > 1) + [(length - m, right, depth + 1)] * (length - m > 1)
        if missing := [part for part in parts if part not in known]:
            pending.extend(missing)
            continue
        total = [sum(column) for column in zip(*(known[part] for part in parts), strict=True)] or [0] * (1 + 3 * tiers)
        total[0] += m
        if length - m > 1:
            total[1 + slots.tier(depth + 1)] += 1
        total[1 + tiers + slots.tier(depth)] += 1
        if m == 1:
            total[1 + 2 * tiers + slots.tier(depth)] += 1
        known[node] = total
    counts = known[root]
    counts[1 + slots.tier(0)] += 1
    by_tier = [tuple(counts[1 + i * tiers : 1 + (i + 1) * tiers]) for i in range(3)]
    return Tally(counts[0], *by_tier)


def _kept(length: int, depth: int, slots: Slots) -> list[int]:
    """A chain that keeps every state."""
    visited = slots.between(depth, depth + length - 1)
    return [length - 1, *slots.between(depth + 1, depth + length - 1), *visited, *visited]


def _single(length: int, depth: int, slots: Slots) -> list[int]:
    """A chain with one snapshot, which always starts over."""
    here = slots.between(depth, depth + 1)
    return [length * (length - 1) // 2, *(0 for _ in here), *(x * (length - 1) for x in here), *here]


def _paired(length: int, s: int, depth: int, slots: Slots) -> list[int]:
    """A chain of s + 1 < length <= 2 s + 1: `split` takes steps two by two until the rest can be kept."""
    pairs = length - s - 1
    rest, top = length - 2 * pairs, depth + pairs
    kept = _kept(rest, top, slots)
    saved = slots.between(depth + 1, top + (rest > 1))
    paired = slots.between(depth, top)
    return [x + y for x, y in zip([3 * pairs, *saved, *(2 * x for x in paired), *paired], kept, strict=True)]


def advances_from(n: int, s: int, position: int) -> int:
    """How many of the t(n, s) advances of the revolve schedule are over steps at or after `position`."""
    total = 0
    while n - 1 > position:
        if position == 0:
            return total + advances(n, s)
        if n <= 2 * s + 1:  # see _kept and _paired
            pairs = max(0, n - s - 1)
            return total + n - 1 - position + max(0, pairs - (position + 1) // 2)
        if s == 1:
            return total + (n - position) * (n - position - 1) // 2
        m = split(n, s)
        if position >= m:
            n, s, position = n - m, s - 1, position - m
        else:
            total += m - position + advances(n - m, s - 1)
            n = m
    return total


def stack_height(n: int, rule: Rule) -> int:
    """The most snapshots that `reversal(n, rule)` holds at a time."""
    if isinstance(rule, Revolve):
        return min(rule.root, n - 1)
    known: dict[tuple[int, int], int] = {}

    def height(length: int, label: int) -> int:
        if length == 1:
            return 0
        if rule.keeps_all(length, label):
            return length - 1
        if (length, label) not in known:
            # A split's siblings follow one another: walk them here, so that recursion is as deep as the tree.
            most, placed, rest, sibling = 0, 0, length, label
            while rest > 1:
                m, left, right = rule.divide(rest, sibling)
                most = max(most, placed + max(1, height(m, left)))
                placed, rest, sibling = placed + 1, rest - m, right
                if right == 1 or rule.keeps_all(rest, right):
                    most = max(most, placed + height(rest, right))
                    break
            known[length, label] = most
        return known[length, label]

    return height(n, rule.root)


def kary(n: int, slots: int, k: int | None = None) -> KAry | None:
    """The k-ary tree with the fewest levels that `slots` snapshots allow (or the given k); None where none fits."""
    if k is None:
        # With l levels, the least k with k**l >= n both holds and advances least.
        choices = sorted({_least_root(n, levels) for levels in range(1, max(2, n.bit_length() + 1))}, reverse=True)
    else:
        choices = [k]
    rules = (KAry(max(2, choice)) for choice in choices)
    return next((rule for rule in rules if stack_height(n, rule) <= slots), None)


def _least_root(n: int, power: int) -> int:
    """The least k with k**power >= n."""
    k = max(1, round(n ** (1 / power)) - 1)
    while k**power < n:
        k += 1
    return k
