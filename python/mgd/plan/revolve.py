"""The binomial optimum (revolve): the arithmetic of reversing a chain of n steps with s snapshots.

Griewank & Walther 2000 (Algorithm 799) prove that the least number of advances with s snapshots, including the one of
the start, is t(n, s) = r n - C(s+r, s+1), where r is the least with n <= C(s+r, s). Many splits attain it. `split`
picks one that also takes the fewest snapshots and that cuts a canonical block off the chain, so that a chain of any
length contains only O(s r) different blocks: schedules of millions of steps are counted, not run.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import lru_cache
from math import comb, isqrt
from typing import NamedTuple


def reach(s: int, r: int) -> int:
    """β(s, r) = C(s+r, s): the longest chain that s snapshots reverse with at most r advances over any step."""
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
    """t(n, s): the least number of advances that reverse n steps with s snapshots, including the start's."""
    if n <= 1:
        return 0
    if n <= s + 1:
        return n - 1
    r = repetitions(n, s)
    return r * n - comb(s + r, s + 1)


def saves(n: int, s: int) -> int:
    """The least number of snapshots that a schedule of t(n, s) advances takes, not counting the start's."""
    if n <= 1:
        return 0
    r = repetitions(n, s)
    return max(reach(s - 1, r - 1), n - reach(s, r - 1)) - 1


@lru_cache(maxsize=1 << 16)
def split(n: int, s: int) -> int:
    """Where to put the next snapshot in a chain of n >= 2 steps, so that both `advances` and `saves` are attained.

    An optimal m needs at most r repetitions in the right part and r-1 in the left. As long as
    n <= γ(s, r) = β(s, r-1) + β(s-1, r-1), the fewest snapshots require both parts to be at most their own γ; for
    longer chains, at least. In either case one part is chosen to be a whole block β or γ.
    """
    r = repetitions(n, s)
    if r == 1:
        return 1
    if n <= _gamma(s, r):
        return min(_gamma(s, r - 1), n - reach(s - 1, r - 1))
    return min(reach(s, r - 1), n - _gamma(s - 1, r))


def _gamma(s: int, r: int) -> int:
    return reach(s, r - 1) + reach(s - 1, r - 1) if s > 0 else 1


class Run(NamedTuple):
    """What `split` does with a chain of n > s + 1 steps and s >= 2 snapshots, for several splits in a row.

    Each of that many splits takes a block off the left: F(s, r-1), F(s-1, r-1), ..., where F is γ or β. With the i-th
    one F(s, r) - F(s-i, r) steps are gone. splits 0: one split, which takes the block F(s-1, r') off the right; r' is r
    for γ and r - 1 for β.
    """

    splits: int
    gamma: bool
    r: int

    def block(self, s: int, r: int) -> int:
        return _gamma(s, r) if self.gamma else reach(s, r)


@lru_cache(maxsize=1 << 16)
def run(n: int, s: int) -> Run:
    """The run of splits that begins with `split(n, s)`. How much a chain lacks of F(s, r) does not change along it."""
    r = repetitions(n, s)
    lacks = _gamma(s, r) - n
    if lacks >= 0:
        count = s - 1 - bisect_left(range(s - 1), lacks, key=lambda j: reach(j, r - 1))
        return Run(count, True, r) if count else Run(0, False, r)
    lacks = reach(s, r) - n
    count = s - 2 - bisect_left(range(s - 2), lacks, key=lambda j: reach(j, r)) if lacks else s - 1
    return Run(count, False, r) if count else Run(0, True, r)


@lru_cache(maxsize=1 << 16)
def advances_from(n: int, s: int, position: int) -> int:
    """How many of the t(n, s) advances of the revolve schedule are over steps at or after `position`."""
    total = 0
    while n - 1 > position:
        if position == 0:
            return total + advances(n, s)
        if n <= s + 1:
            return total + n - 1 - position
        if s == 1:
            return total + (n - position) * (n - position - 1) // 2
        row = run(n, s)
        if row.splits:
            whole = row.block(s, row.r)
            i = bisect_right(range(1, row.splits + 1), position, key=lambda i: whole - row.block(s - i, row.r))
            gone = whole - row.block(s - i, row.r)
            n, s, position = n - gone, s - i, position - gone
            if i == row.splits:
                continue
        m = split(n, s)
        if position >= m:
            n, s, position = n - m, s - 1, position - m
        else:
            total += m - position + advances(n - m, s - 1)
            n = m
    return total
