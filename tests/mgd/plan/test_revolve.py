"""The reversal of chains: closed forms against dynamic programming, and counts against the moves themselves."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgd.plan.reversal import KAry, Revolve, kary, reversal, stack_height
from mgd.plan.revolve import advances, advances_from, repetitions, saves, split
from mgd.plan.tally import Slots, Tally, binomial, counted, tally


@lru_cache(None)
def least(n: int, s: int) -> tuple[int, int]:
    """(advances, snapshots besides the start's) of the best reversal, by trying every split."""
    if n == 1:
        return 0, 0
    if s == 1:
        return n * (n - 1) // 2, 0
    choices = []
    for m in range(1, n):
        (right, right_saves), (left, left_saves) = least(n - m, s - 1), least(m, s)
        choices.append((m + right + left, right_saves + left_saves + (n - m > 1)))
    return min(choices)


def test_closed_forms_are_the_optimum():
    for n in range(1, 121):
        for s in range(1, 14):
            assert (advances(n, s), saves(n, s)) == least(n, s), (n, s)


def test_griewank_and_walther():
    """Values of Algorithm 799's formula, and what the design quotes."""
    assert advances(1000, 10) == 3636
    assert advances(1000, 44) == 1954
    assert advances(10_000, 15) - 9_999 == 35_156
    assert [repetitions(10, s) for s in (1, 2, 3, 9)] == [9, 3, 2, 1]


def run(n: int, rule, slots: Slots) -> tuple[Tally, int, Counter]:
    """Make the moves, checking each; the tally, the most snapshots held, how often each step was advanced over."""
    position, turn, held, most = 0, n - 1, {}, 0
    counts = {kind: [0] * len(slots.counts) for kind in ("save", "load", "turn")}
    passed: Counter = Counter()
    for kind, at, depth in reversal(n, rule):
        if depth >= 0:
            counts[kind][slots.tier(depth)] += 1
        if kind == "save":
            assert at == position and at not in held and depth == len(held)
            held[at] = depth
            most = max(most, len(held))
        elif kind == "load":
            assert held[at] == depth
            position = at
        elif kind == "advance":
            assert at > position
            passed.update(range(position, at))
            position = at
        else:
            assert at == position == turn
            turn -= 1
            if depth >= 0:
                assert held.pop(at) == depth
    assert turn == -1 and not held
    by_kind = (tuple(counts[kind]) for kind in ("save", "load", "turn"))
    return Tally(passed.total(), *by_kind), most, passed


def thirds(count: int, draw: int) -> Slots:
    fast = draw % (count + 1)
    middle = draw // 7 % (count - fast + 1)
    return Slots((fast, middle, count - fast - middle))


def test_every_reversal_of_up_to_250_steps():
    for n in (*range(2, 70), *range(70, 251, 9), 250):
        for s in (*range(1, 9), 11, 16, 23, 60, 250):
            slots = thirds(min(s, n - 1), 31 * n + s)
            done, most, passed = run(n, Revolve(s), slots)
            assert done.advances == advances(n, s)
            assert sum(done.saves) == 1 + saves(n, s)
            assert most == stack_height(n, Revolve(s)) == min(s, n - 1)
            assert done == tally(n, Revolve(s), slots)
            # The start is passed most often, r times: the shorter first segment of a plan counts on it.
            assert passed[0] == max(passed.values()) == repetitions(n, s)
            for position in {0, 1, n // 3, n // 2, n - 2, n - 1, n}:
                assert advances_from(n, s, position) == sum(passed[i] for i in range(position, n)), position


@given(n=st.integers(2, 10**6), s=st.integers(1, 3000), share=st.floats(0, 1))
@settings(deadline=None)
def test_the_binomials_are_what_blocks_counted_one_by_one_add_up_to(n, s, share):
    s = min(s, n - 1)
    depths = np.array([0, 1, s // 3, round(share * s), s - 1, s])
    done, blocks = (of.below(depths) for of in (binomial(n, s), counted(n, Revolve(s))))
    for kind, expected in zip(done, blocks, strict=True):
        assert kind.tolist() == expected.tolist()


def test_every_tree_of_up_to_250_steps():
    for n in (*range(2, 70), *range(70, 251, 9)):
        for k in (2, 3, 4, 5, 8, 16, 100):
            rule = KAry(k)
            slots = thirds(stack_height(n, rule), 17 * n + k)
            done, most, _ = run(n, rule, slots)
            assert most == slots.total
            assert done == tally(n, rule, slots)
            assert done.advances >= advances(n, most)


@given(n=st.integers(2, 10**7), s=st.integers(1, 10**4))
@settings(deadline=None)
def test_split_is_optimal_at_any_length(n, s):
    m = split(n, s)
    assert 1 <= m < n
    if s > 1:
        assert m + advances(n - m, s - 1) + advances(m, s) == advances(n, s)
        assert (n - m > 1) + saves(n - m, s - 1) + saves(m, s) == saves(n, s)


@pytest.mark.parametrize(
    ("n", "slots", "k"), [(1000, 10, 2), (1000, 18, 4), (1000, 40, 10), (1000, 63, 32), (1000, 999, 1000)]
)
def test_kary_takes_the_flattest_tree(n, slots, k):
    assert kary(n, slots).k == k
    assert stack_height(n, KAry(k)) <= slots


def test_known_comparison_points():
    """Section "Comparison" of docs/planning.md: replays, that is advances beyond the first sweep, of 10,000 steps."""
    n = 10_000

    def replays(rule):
        return tally(n, rule, Slots((stack_height(n, rule),))).advances - (n - 1)

    root = KAry(100)  # a checkpoint every sqrt(n) steps
    assert stack_height(n, root) + 1 == 199  # with the current state
    assert replays(root) == 9_801 == round(0.98 * n) + 1
    # Two sweeps by revolve take the least s with C(s+2, 2) >= n.
    assert [repetitions(n, s) for s in (139, 140)] == [3, 2]
    assert replays(Revolve(140)) == 9_859
    binary = KAry(2)
    assert stack_height(n, binary) + 1 == 15
    assert replays(binary) == 54_609
    assert replays(Revolve(15)) == 35_156
    assert replays(Revolve(14)) == 36_125
