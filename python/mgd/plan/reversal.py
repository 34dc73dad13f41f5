"""Reversal of a chain of n steps from few snapshots: binomial (revolve) and k-ary schedules, and their moves.

The chain has positions 0..n. Its steps are turned in the order n-1, ..., 0, and step i is turned at position i.
A position is reached by advancing, one position per step, or by loading a snapshot. Each schedule here is a rule that
splits a chain at m: save a snapshot of the start, advance to m, reverse the right part, load the start, reverse the
left part. The rules differ in m, and in how many slots they pass on to each part.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from mgd.plan.revolve import split


class Rule(Hashable, Protocol):
    """How to split a chain of n steps. A label is the state that the rule passes from one split to the next."""

    @property
    def root(self) -> int:
        """The label of the whole chain."""

    def divide(self, n: int, label: int) -> tuple[int, int, int]:
        """The split m, and the labels of the left and right parts."""

    def keeps_all(self, n: int, label: int) -> bool:
        """Whether all further splits are at m = 1, so that every state is saved."""


@dataclass(frozen=True)
class Revolve:
    """The optimum for s snapshots. The label is the number of snapshots available."""

    root: int

    def divide(self, n: int, label: int) -> tuple[int, int, int]:
        return split(n, label), label, label - 1

    def keeps_all(self, n: int, label: int) -> bool:
        return n <= label + 1


@dataclass(frozen=True)
class KAry:
    """REPLAY's k-ary tree (arXiv 2503.13751): k children of equal length, down to single steps.

    The label is the number of siblings still to be placed. k = 2 is the logarithmic scheme, k = ceil(sqrt(n)) the
    well-known one with a checkpoint every sqrt(n) steps, and k >= n saves every state.
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

    `depth` is the snapshot's position on the stack of snapshots held. A turn with depth >= 0 is at a snapshot, which is
    not needed again and must now be dropped. A turn with depth -1 is at none.
    """

    kind: str
    at: int
    depth: int = -1


def reversal(n: int, rule: Rule) -> Iterator[Move]:
    """The moves that reverse a chain of n steps, from position 0. Memory: one entry per snapshot held."""
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


def stack_height(n: int, rule: Rule) -> int:
    """The most snapshots that `reversal(n, rule)` holds at any time."""
    if isinstance(rule, Revolve):
        return min(rule.root, n - 1)
    heights: dict[tuple[int, int], int] = {}

    def height(length: int, label: int) -> int:
        if length == 1:
            return 0
        if rule.keeps_all(length, label):
            return length - 1
        if (length, label) not in heights:
            # Siblings are walked in a loop, so that the recursion is only as deep as the tree.
            most, depth, rest, sibling = 0, 0, length, label
            while rest > 1:
                m, left, right = rule.divide(rest, sibling)
                most = max(most, depth + max(1, height(m, left)))
                depth, rest, sibling = depth + 1, rest - m, right
                if right == 1 or rule.keeps_all(rest, right):
                    most = max(most, depth + height(rest, right))
                    break
            heights[length, label] = most
        return heights[length, label]

    return height(n, rule.root)


def kary(n: int, slots: int, k: int | None = None) -> KAry | None:
    """The k-ary tree with the fewest levels (or with the given k) that fits in `slots` snapshots; None if none fits."""
    if k is None:
        # With l levels, the least k with k**l >= n holds the fewest snapshots and advances the least.
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
