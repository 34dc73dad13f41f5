"""The binomial optimum (revolve): the arithmetic of reversing a chain of n steps with s snapshots.

Griewank & Walther 2000 (Algorithm 799) prove that the least number of advances with s snapshots, including the one of
the start, is t(n, s) = r n - C(s+r, s+1), where r is the least with n <= C(s+r, s). Many splits attain it. `split`
picks one that also takes the fewest snapshots and that cuts a canonical block off the chain, so that a chain of any
length contains only O(s r) different blocks: schedules of millions of steps are counted, not run.
"""

from __future__ import annotations

from functools import lru_cache
from math import comb, isqrt


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


@lru_cache(maxsize=1 << 16)
def advances_from(n: int, s: int, position: int) -> int:
    """How many of the t(n, s) advances of the revolve schedule are over steps at or after `position`."""
    total = 0
    while n - 1 > position:
        if position == 0:
            return total + advances(n, s)
        if n <= 2 * s + 1:  # see `_all_saved` and `_paired` of `mgd.plan.tally`
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
