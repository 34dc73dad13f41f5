"""The search for the fastest layout under a budget.

A layout is three numbers: segments of L steps, s snapshots of segment starts, and c snapshots inside a segment. The
number of model steps has a closed form, T + r N - L C(s+r, s+1), and so does the number of updates. Candidates are
therefore compared by a lower bound that costs microseconds, and only the most promising ones are counted in full, with
the traffic of every tier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import comb, inf
from typing import NamedTuple

from mgd.plan.budget import Costs, Sizes
from mgd.plan.layout import Layout, rebuilt
from mgd.plan.reversal import Revolve
from mgd.plan.revolve import reach, repetitions, saves

#: Among the plans within this factor of the fastest one's time, the one with the least peak is chosen.
THRIFT = 1.01

#: How many candidates are counted in full: this many of the fastest, and as many of the smallest that are fast enough.
SHORTLIST = 8


class Candidate(NamedTuple):
    """A possible layout. `bound`: a lower bound on its seconds. `peak`: its bytes in all tiers together.

    A tuple, because thousands of them are compared.
    """

    bound: float
    peak: int
    length: int
    outer: int
    inner: int
    tiers: int


@dataclass(frozen=True)
class Search:
    """Finds the fastest layout of `chain` steps in logged segments. `limits`: bytes by tier, fastest first.

    stop_at: the number of steps before the chain, which are only trained; transfers may run beside them too.
    """

    chain: int
    sizes: Sizes
    limits: Mapping[str, int]
    costs: Costs
    stop_at: int = 0

    def best(self, *layouts: Layout) -> Layout:
        """The smallest of the layouts that are nearly the fastest; never slower than any of `layouts`."""
        families = [list(self.plain()), list(self.segmented())]
        timed = [(self.seconds(layout), sum(layout.peak), i, layout) for i, layout in enumerate(layouts)]
        at_most = min((seconds for seconds, *_ in timed), default=inf)
        for family in families:
            timed += self._time(family, min((seconds for seconds, *_ in timed), default=inf), len(timed))
        limit = min(at_most, THRIFT * min(timed)[0])
        return min((peak, seconds, i, layout) for seconds, peak, i, layout in timed if seconds <= limit)[-1]

    def best_log(self) -> Layout | None:
        """The same among full logs alone; None if none fits."""
        timed = self._time(list(self.logs()), inf, 0)
        limit = THRIFT * min(timed)[0] if timed else 0
        return min(((p, t, i, layout) for t, p, i, layout in timed if t <= limit), default=(None,))[-1]

    def unrivalled(self, full_log: Layout) -> bool:
        """Whether every layout that is not a full log is too slow to be chosen beside this one, the best full log.

        All others compute at least one gradient more. It spares short trainings the search.
        """
        costs = self.costs
        others = (self.chain + 1) * costs.step + self.chain * costs.hvp
        return THRIFT * self.seconds(full_log) < others

    def seconds(self, layout: Layout) -> float:
        return sum(phase.seconds(layout.tiers, self.costs) for phase in layout.phases(self.stop_at))

    def _time(self, candidates: list[Candidate], best: float, tag: int) -> list[tuple[float, int, int, Layout]]:
        """Count the most promising candidates in full: (seconds, peak, tag, layout)."""
        timed: list[tuple[float, int, int, Layout]] = []

        def count(some: list[Candidate]) -> None:
            nonlocal best
            for candidate in some:
                if candidate.bound > THRIFT * best:
                    continue
                if (layout := self.fit(candidate)) is not None:
                    timed.append((self.seconds(layout), sum(layout.peak), tag + len(timed), layout))
                    best = min(best, timed[-1][0])

        candidates = sorted(set(candidates))
        count(candidates[:SHORTLIST])
        thrifty = [c for c in candidates[SHORTLIST:] if c.bound <= THRIFT * best]
        count(sorted(thrifty, key=lambda c: (c.peak, c.bound))[:SHORTLIST])
        return timed

    def fit(self, candidate: Candidate) -> Layout | None:
        limits = self.fastest(candidate.tiers)
        rule = Revolve(max(1, candidate.outer))
        length, outer, inner = candidate.length, candidate.outer, candidate.inner
        return Layout.fit(limits, self.sizes, self.chain, length, rule, outer, inner)

    def fastest(self, used: int) -> dict[str, int]:
        """The limits when only the `used` fastest tiers may be used."""
        return {tier: room if i < used else 0 for i, (tier, room) in enumerate(self.limits.items())}

    # --- candidates ---------------------------------------------------------------------------------------------

    def plain(self) -> Iterator[Candidate]:
        """No log, and as many snapshots as fit."""
        for used in range(1, len(self.limits) + 1):
            if slots := self._slots(used):
                yield self.candidate(1, min(slots, self.chain - 1), 0, used)

    def logs(self) -> Iterator[Candidate]:
        """One segment, with various numbers of snapshots inside."""
        for used in range(1, len(self.limits) + 1):
            spare = sum(self.fastest(used).values()) - (self.chain - 1) * self.sizes.gradient
            most = min(self.chain - 1, spare // self.sizes.snapshot)
            yield from (self.candidate(self.chain, 0, c, used) for c in _spread(most, 8))

    def segmented(self) -> Iterator[Candidate]:
        """Several segments. For each c: the values of s worth trying, the longest segments, and some shorter ones."""
        for used in range(1, len(self.limits) + 1):
            coarse: list[Candidate] = []
            slots = min(self._slots(used), self.chain)
            for inner in _spread(slots - 1, 6):
                for outer in self._outers(used, inner, slots - inner):
                    coarse += self._segments(used, outer, inner)
            yield from coarse
            # The neighbours of the best of these.
            for near in sorted(set(coarse))[:3]:
                for outer in range(max(1, near.outer - 2), near.outer + 3):
                    for inner in range(max(1, near.inner - 2), near.inner + 3):
                        yield from self._segments(used, outer, inner)

    def _outers(self, used: int, inner: int, most: int) -> set[int]:
        """The numbers s of outer snapshots to try. Each snapshot takes room from the log.

        With r repetitions the model runs r N - L C(s+r, s+1) steps. For a given r the best s is about `most` (r-1)/r,
        or the s at which r begins to be enough, N <= L C(s+r, s). That product peaks at about `most` r/(r+1).
        """
        numbers: set[int] = set()
        for r in _spread(self.chain, 12):
            peak = max(1, most * r // (r + 1))

            def enough(s: int, r: int = r) -> bool:
                return self._longest(used, s, inner) * reach(s, r) >= self.chain

            if most < 1 or not enough(peak):
                continue
            least = _bisect(enough, 1, peak)
            numbers.update((least, max(least, most * (r - 1) // r), peak))
            if least == 1:
                break
        return {s for s in numbers if s <= most}

    def _segments(self, used: int, outer: int, inner: int) -> Iterator[Candidate]:
        longest = min(self._longest(used, outer, inner), self.chain - 1)
        if longest < 2:
            return
        # The longest segments need the fewest model steps. Segments of equal length, and those that `inner` snapshots
        # reverse with fewer repetitions, need fewer updates. Room that is split across tiers may lose some entries.
        lengths = {longest, -(-self.chain // -(-self.chain // longest))}
        lengths.update(reach(inner, r) for r in _spread(repetitions(longest, inner) - 1, 4))
        lengths.update(
            longest - i for i in range(1, used * (used > 1) * (self.sizes.snapshot // self.sizes.gradient) + 1)
        )
        for length in lengths:
            if 2 <= length <= longest:
                segments = -(-self.chain // length)
                yield self.candidate(length, min(outer, segments - 1), min(inner, length - 1), used)

    def _slots(self, used: int) -> int:
        return sum(room // self.sizes.snapshot for room in self.fastest(used).values())

    def _longest(self, used: int, outer: int, inner: int) -> int:
        """The longest segment that fits beside these snapshots: outer on the slowest tiers, inner on the fastest."""
        free = list(self.limits.values())[:used]
        for count, order in ((outer, range(used - 1, -1, -1)), (inner, range(used))):
            for i in order:
                here = min(count, free[i] // self.sizes.snapshot)
                free[i] -= here * self.sizes.snapshot
                count -= here
            if count:
                return 0
        return 1 + sum(room // self.sizes.gradient for room in free)

    def candidate(self, length: int, outer: int, inner: int, used: int) -> Candidate:
        """A candidate with the lower bound on its time: all its work, and its traffic as if all on the best tier."""
        state, grad, costs = self.sizes.snapshot, self.sizes.gradient, self.costs
        n = -(-self.chain // length)
        first = self.chain - (n - 1) * length
        model = self.chain
        if n > 1:
            r = repetitions(n, outer)
            model += r * self.chain - length * comb(outer + r, r - 1)
        updates = (n - 1) * rebuilt(length, inner) + rebuilt(first, min(inner, first - 1))
        logged = self.chain - n
        written = state * (saves(n, outer) + (n - 1) * saves(length, inner)) + grad * logged
        read = state * (self.chain - 1) + grad * (updates + logged)
        work = model * costs.step + updates * costs.update + self.chain * costs.hvp
        write_cost, read_cost, beside = self._traffic[used - 1]
        moving = written * write_cost + read * read_cost
        if beside == 0:
            work += moving
        elif beside == used:
            work = max(work, moving / used)
        return Candidate(work, state * (outer + inner) + grad * (length - 1), length, outer, inner, used)

    @cached_property
    def _traffic(self) -> list[tuple[float, float, int]]:
        """For the 1, 2, ... fastest tiers: the least seconds per byte written and read, and how many overlap."""
        costs, tiers = self.costs, list(self.limits)
        return [
            (
                min(1 / costs.write[tier] for tier in tiers[:used]),
                min(1 / costs.read[tier] for tier in tiers[:used]),
                sum(tier in costs.overlap for tier in tiers[:used]),
            )
            for used in range(1, len(tiers) + 1)
        ]


def _bisect(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The least number in low..high for which `holds` is true. It must be monotonic, and true for `high`."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _spread(most: int, dense: int) -> Iterator[int]:
    """Numbers from 1 to `most`: all up to `dense`, then each a quarter larger than the one before, and `most`."""
    value = 1
    while value < most:
        yield value
        value += 1 if value < dense else 1 + value // 4
    if most >= 1:
        yield most
