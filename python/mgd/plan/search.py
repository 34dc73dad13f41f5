"""The search for the fastest plan under a budget: branch and bound over the shapes of `mgd.plan.shapes`.

The shapes depend neither on the budget nor on the tiers. A larger budget only adds placements to choose from, and a
faster tier makes none of them slower. So neither makes the plan slower, unless the search ends early (`MOST`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import numpy as np

from mgd.plan.budget import Costs, Sizes
from mgd.plan.layout import Layout
from mgd.plan.placement import Placements, Shape
from mgd.plan.reversal import Revolve
from mgd.plan.shapes import Bound, Shapes, coarse, full_logs, near
from mgd.plan.tally import Slots

#: Ample inner snapshots must make a plan faster by this factor to be worth their memory.
THRIFT = 1.006

#: The finer search looks for plans that take less than this share of the time of the best so far.
ENOUGH = 0.999

#: The most shapes that are placed in one search on one tier; on more, there are more ways to place each of them.
MOST = 1200


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

    def best(self, plain: Layout) -> Layout:
        """The fastest layout of all shapes; never slower than `plain`."""
        chosen = self._best(coarse(self.chain), self.seconds(plain)) or plain
        better: Layout | None = chosen
        while better is not None:
            chosen = better
            shapes = near(self.chain, chosen.length, chosen.outer.total, chosen.inner.total)
            better = self._best(shapes, ENOUGH * self.seconds(chosen))
        return chosen

    def best_log(self) -> Layout | None:
        """The fastest of the full logs; None if none fits."""
        return self._best(full_logs(self.chain), inf)

    def _best(self, shapes: Shapes, best: float) -> Layout | None:
        """The fastest layout of some shapes, if it takes less than `best` seconds."""
        bounds = Bound(self.chain, self.sizes, self.limits, self.costs, self.stop_at)(shapes)
        bounds = np.where(shapes.ample, THRIFT * bounds, bounds)
        chosen = None
        for i in np.argsort(bounds, kind="stable")[: MOST // len(self.limits) ** 2]:
            if bounds[i] >= best:
                break
            found = self._placed(*(int(x[i]) for x in (shapes.length, shapes.outer, shapes.inner)))
            if found is not None and (seconds := found[0] * (THRIFT if shapes.ample[i] else 1)) < best:
                best, chosen = seconds, found[1]
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
        return seconds, Layout(tiers, self.sizes, self.chain, length, rule, Slots(o), Slots(i), log)
