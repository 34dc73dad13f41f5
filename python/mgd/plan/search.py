"""The search for the fastest plan under a budget: branch and bound over the shapes of `mgd.plan.shapes`.

The shapes depend neither on the budget nor on the tiers. A larger budget only adds placements to choose from, and a
faster tier makes none of them slower. So neither makes the plan slower, but for what a search leaves out (`MOST`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from mgd.plan.budget import Costs, Sizes
from mgd.plan.ideal import THRIFT, Ideal
from mgd.plan.layout import Layout
from mgd.plan.placement import Placements, Shape
from mgd.plan.reversal import Revolve
from mgd.plan.shapes import NEAR, Bound, Shapes, coarse, every, full_logs, near
from mgd.plan.tally import Slots

#: The finer search looks for plans that take less than this share of the time of the best so far.
ENOUGH = 0.999

#: A search of at most so many steps goes on near every start; of more steps it would take too long. It takes up to a
#: second, which only longer trainings than so many seconds are worth.
EVERY_START, WORTH = 1000, 100.0

#: The most shapes that are placed in one search on one tier, on two and on three, for chains of at most so many steps.
#: Placing a long log takes longer. A search near the best shape places as many as for the longest chains.
MOST = ((60, (1200, 1200, 240)), (1000, (1200, 300, 60)), (inf, (300, 75, 20)))
FEWEST = MOST[-1][1]


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

    def best(self) -> Layout:
        """The fastest layout found. There must be room for a snapshot.

        Every combination of tiers is searched, from what its parts led to. So one more tier never makes a plan slower.
        """
        ideal = Ideal(self.chain, self.sizes, self.limits, self.costs, self.stop_at)
        enough = THRIFT * ideal.seconds
        for layout in ideal.full_logs():
            if self.seconds(layout) <= ideal.enough:
                return layout
        found: dict[frozenset[str], Layout] = {}
        for tiers in self._combinations():
            part = replace(self, limits={tier: room for tier, room in self.limits.items() if tier in tiers})
            starts = [found[tiers - {tier}] for tier in part.limits if tiers - {tier} in found]
            starts += part.revolve()
            if starts:
                chosen = self._widened(part._search(starts, enough))
                if self.seconds(chosen) <= enough:
                    break
                found[tiers] = chosen
        return chosen

    def revolve(self) -> list[Layout]:
        """Layouts without a log, as far as there is room for a snapshot: as many snapshots as fit, half of them, ..."""
        slots = min(self.chain - 1, sum(room // self.sizes.snapshot for room in self.limits.values()))
        counts = [slots >> k for k in range(slots.bit_length())]
        if len(self.limits) == 1:
            del counts[1:]  # the bound of one tier is tight, so that the search finds the others soon
        fits = (Layout.fit(self.limits, self.sizes, self.chain, 1, Revolve(count), count, 0) for count in counts)
        return [layout for layout in fits if layout is not None]

    def best_log(self) -> Layout | None:
        """The fastest of the full logs; None if none fits."""
        return self._fastest(full_logs(self.chain), inf, 0.0, FEWEST)

    def _combinations(self) -> Iterator[frozenset[str]]:
        """Of the tiers that can hold anything, all combinations, and those of fewer tiers first."""
        tiers = [tier for tier, room in self.limits.items() if room >= min(self.sizes.snapshot, self.sizes.gradient)]
        for count in range(1, len(tiers) + 1):
            yield from map(frozenset, itertools.combinations(tiers, count))

    def _widened(self, layout: Layout) -> Layout:
        """The layout of a search on some of the tiers, as one of all tiers."""
        if layout.tiers == tuple(self.limits):
            return layout

        def on_all(counts: tuple[int, ...]) -> tuple[int, ...]:
            held = dict(zip(layout.tiers, counts, strict=True))
            return tuple(held.get(tier, 0) for tier in self.limits)

        outer, inner = (Slots(on_all(slots.counts)) for slots in (layout.outer, layout.inner))
        layout = replace(layout, tiers=tuple(self.limits), outer=outer, inner=inner, log=on_all(layout.log))
        return layout.keeping(self.limits)

    def _search(self, starts: Sequence[Layout], enough: float) -> Layout:
        """The fastest layout that is found, or one that takes no more than `enough` seconds.

        starts: plans of fewer tiers, and without a log. They differ in kind, and any may be close to the best.
        """
        start = min(starts, key=self.seconds)
        if len(self.limits) > 1:  # on one tier the bound is tight, so that the search finds full logs soon
            start = self._fastest(full_logs(self.chain), self.seconds(start), enough, FEWEST) or start
        best = self.seconds(start)
        most = next(most for steps, most in MOST if self.chain <= steps)
        chosen = self._fastest(coarse(self.chain), best, enough, most) or start
        if every(self.chain):
            return chosen
        thorough = self.chain <= EVERY_START and self.seconds(chosen) > WORTH
        lengths: list[int] = []  # of what was found so far
        for other in (chosen, *(sorted(starts, key=self.seconds) if thorough else ())):
            if self.seconds(chosen) <= enough:
                break
            if not any(other.length <= NEAR * x and x <= NEAR * other.length for x in lengths):
                found = self._refined(self._widened(other), enough)
                lengths.append(found.length)
                chosen = min(chosen, found, key=self.seconds)
        return chosen

    def _refined(self, layout: Layout, enough: float) -> Layout:
        """The fastest layout that finer steps lead to."""
        better: Layout | None = layout
        while better is not None and (best := self.seconds(better)) > enough:
            layout = better
            shapes = near(self.chain, layout.length, layout.outer.total, layout.inner.total)
            better = self._fastest(shapes, ENOUGH * best, enough, FEWEST)
        return better or layout

    def _fastest(self, shapes: Shapes, best: float, enough: float, most: Sequence[int]) -> Layout | None:
        """The fastest layout of some shapes, if it takes less than `best` seconds; or one that takes `enough`."""
        bounds = Bound(self.chain, self.sizes, self.limits, self.costs, self.stop_at)(shapes, best)
        order = np.flatnonzero(bounds < best)
        order = order[np.argsort((np.where(shapes.ample, THRIFT, 1.0) * bounds)[order], kind="stable")]
        chosen = None
        for i in order[: most[len(self.limits) - 1]]:
            if best <= enough:
                break
            if bounds[i] < best:
                found = self._placed(*(int(x[i]) for x in (shapes.length, shapes.outer, shapes.inner)))
                if found is not None and found[0] < best:
                    best, chosen = found
        return chosen

    def seconds(self, layout: Layout) -> float:
        return sum(phase.seconds(layout.tiers, self.costs) for phase in layout.phases(self.stop_at))

    def _placed(self, length: int, outer: int, inner: int) -> tuple[float, Layout] | None:
        """The fastest placement of a shape."""
        shape = Shape(self.chain, length, outer, inner)
        found = Placements(shape, self.sizes, self.limits, self.costs, self.stop_at).best()
        if found is None:
            return None
        seconds, (o, i, log) = found
        rule, tiers = Revolve(max(1, outer)), tuple(self.limits)
        layout = Layout(tiers, self.sizes, self.chain, length, rule, Slots(o), Slots(i), log)
        return seconds, layout.keeping(self.limits)
