"""The search for the fastest plan under a budget: branch and bound over the shapes of `mgd.plan.shapes`.

The shapes depend neither on the budget nor on the tiers. A larger budget only adds placements to choose from, and a
faster tier makes none of them slower. So neither makes the plan slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf

import numpy as np

from mgd.plan.budget import Costs, Sizes
from mgd.plan.layout import Layout
from mgd.plan.placement import Placements, Shape
from mgd.plan.reversal import Revolve
from mgd.plan.shapes import Bound, Shapes, full_logs, open_shapes
from mgd.plan.tally import Slots

#: So many open shapes are refined at a time.
BATCH = 64


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
        return self._best(open_shapes(self.chain), self.seconds(plain)) or plain

    def best_log(self) -> Layout | None:
        """The fastest of the full logs; None if none fits."""
        return self._best(full_logs(self.chain), inf)

    def _best(self, shapes: Shapes, best: float) -> Layout | None:
        """The fastest layout of some shapes, if it takes less than `best` seconds."""
        chosen = None
        for bounds, some in self._in_order(shapes, BATCH):
            if bounds[0] > best:
                break
            for bound, one in self._in_order(some[np.flatnonzero(bounds <= best)].refined(self.costs), 1):
                if bound[0] > best:
                    break
                found = self._placed(one)
                if found is not None and found[0] < best:
                    best, chosen = found
        return chosen

    def seconds(self, layout: Layout) -> float:
        return sum(phase.seconds(layout.tiers, self.costs) for phase in layout.phases(self.stop_at))

    def _in_order(self, shapes: Shapes, batch: int) -> Iterator[tuple[np.ndarray, Shapes]]:
        """Batches of shapes with their bounds, the most promising first, as far as they fit."""
        bounds = Bound(self.chain, self.sizes, self.limits, self.costs, self.stop_at)(shapes)
        order = np.argsort(bounds, kind="stable")[: np.isfinite(bounds).sum()]
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            yield bounds[some], shapes[some]

    def _placed(self, one: Shapes) -> tuple[float, Layout] | None:
        """The fastest placement of a shape."""
        assert one.inner is not None
        length, outer, inner = (int(x[0]) for x in (one.length, one.outer, one.inner))
        shape = Shape(self.chain, length, outer, inner)
        found = Placements(shape, self.sizes, self.limits, self.costs, self.stop_at).best()
        if found is None:
            return None
        seconds, (o, i, log) = found
        rule, tiers = Revolve(max(1, outer)), tuple(self.limits)
        return seconds, Layout(tiers, self.sizes, self.chain, length, rule, Slots(o), Slots(i), log)
