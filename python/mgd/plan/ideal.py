"""What no plan can beat, and plans that come close to it where memory is ample.

Every step is trained once and reversed once. The state of each but the last is loaded, and its gradient is either
logged, written and read, or computed again, with its residuals then. Residuals of all others have to be held when the
training ends, as far as there is room. Let w be the seconds to write a snapshot and u those of an update. The
first state is saved. Each of the M = N - 2 after it is saved, or reached by an update from the state before it; by one
alone, only if that one is saved. With S more saves this takes S w + (M - S) u + max(0, M - 2S - 1) u at least. That is
linear between S = 0, (M - 1) / 2 and M, so the least is at one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from mgd.plan.budget import Costs, Sizes
from mgd.plan.layout import Layout
from mgd.plan.reversal import Revolve
from mgd.plan.revolve import advances, saves
from mgd.plan.shapes import fewest_saves, thrifty

#: A plan that takes at most this factor of what no plan can beat is not searched any further.
THRIFT = 1.006

#: Neither is a full log that takes so many seconds more: a search takes about as long.
SEARCH = 1e-3


@dataclass(frozen=True)
class Ideal:
    """A chain of at least 2 steps, after `stop_at` that are only trained. limits: bytes by tier, fastest first."""

    chain: int
    sizes: Sizes
    limits: Mapping[str, int]
    costs: Costs
    stop_at: int = 0

    @cached_property
    def seconds(self) -> float:
        """No plan takes less. More memory, one more tier or a faster one does not make it larger."""
        update, save = self._again
        step, log = self.costs.step, self.sizes.gradient * self._rates[2]
        kept, saved = self._residuals
        once = (kept - 1) * min(step, log) if kept else -max(0.0, min(step - saved, log))
        once += (self.chain - kept) * min(step - saved, log)
        others = self.chain - 2
        again = min((2 * others - 1) * update, ((others - 1) * save + (others + 1) * update) / 2, others * save)
        return self._loaded + once + save + max(0.0, again)

    @property
    def enough(self) -> float:
        """Seconds of a full log that is good enough."""
        return max(THRIFT * self.seconds, self.seconds + SEARCH)

    def full_logs(self) -> Iterator[Layout]:
        """Full logs that may be good enough, those with the fewest snapshots first."""
        update, save = self._again
        logged = self._loaded + (self.chain - 1) * self.sizes.gradient * self._rates[2]
        for slots in sorted({thrifty(self.chain), *fewest_saves(self.chain)}):
            updates = advances(self.chain, slots) - (self.chain - 1)
            saved = max(slots, 1 + saves(self.chain, slots))
            if logged + updates * update + saved * save <= self.enough:
                layout = Layout.fit(self.limits, self.sizes, self.chain, self.chain, Revolve(1), 0, slots)
                if layout is not None:
                    yield layout

    @cached_property
    def _loaded(self) -> float:
        """Training, reversing, and loading a state for each step but the last."""
        kept, saved = self._residuals
        work = self.costs.step * (self.stop_at + self.chain) + self.costs.hvp * self.chain - saved * kept
        return work + (self.chain - 1) * self.sizes.snapshot * self._rates[1]

    @cached_property
    def _residuals(self) -> tuple[int, float]:
        """The most steps whose residuals are held at a time, and the seconds that each of them saves."""
        if not self.sizes.residuals:
            return 0, 0.0
        most = self.limits.get(self.sizes.memory, 0) // self.sizes.residuals
        return min(self.chain, most), self.costs.hvp - self.costs.hvp_kept

    @cached_property
    def _again(self) -> tuple[float, float]:
        """The least seconds of an update and of a save."""
        write, read, _ = self._rates
        return min(self.costs.step, self.costs.update + self.sizes.gradient * read), self.sizes.snapshot * write

    @cached_property
    def _rates(self) -> tuple[float, float, float]:
        """The processor's least seconds per byte to write, to read, and to do both on one tier."""
        costs = self.costs
        copying = {tier: (costs.copy, costs.copy) for tier in costs.overlap}
        rates = [copying.get(tier, (costs.write[tier], costs.read[tier])) for tier in self.limits]
        seconds = [(1 / write, 1 / read, 1 / write + 1 / read) for write, read in rates]
        write, read, both = (min(column) for column in zip(*seconds, strict=True))
        return write, read, both
