"""When it pays to run tasks together: by rent or buy, in measured seconds, as in `mgd.autodiff.payoff`.

To run tasks of a kind together takes graphs: of their steps, of their objective, and of both for so many tasks at once.
These cost seconds. Until there are such graphs, tasks run one by one, and each adds what running it together would have
saved to an account. The graphs are made once the account, with what the rest of a list promises, exceeds their cost. An
account lives as long as the model and the loss of its tasks, through all calls. What tasks take together is measured as
well, and where one by one is as fast, they go on so. A failure is charged like a purchase; some in a row are the end.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mgd.autodiff.captured import CapturedEvaluator
from mgd.autodiff.objectives import code_of
from mgd.autodiff.payoff import IMPORT, Rate
from mgd.function import TrainingFunction
from mgd.step.batches import described

FIRST = 2  # tasks that run one by one before anything is decided; the very first one warms up
CAUTION = 1.0  # the costs count so much; more buys late, which is as dear as early
# Saved, as long as it is not known: this share of a task's seconds, and at most so many for each evaluation, and for
# each node of its autograd graph, which is what Python and small operators take. Measured, on busy cores: 0.7 to 0.9,
# or 0.4 (a convnet), and 1.5 ms (5 nodes) to 3.2 ms (18 nodes).
SAVED, SAVED_PER_EVALUATION, SAVED_PER_NODE = 0.85, 1e-3, 60e-6
OF_VALUES = 0.3  # of this, where no gradient is wanted
FASTER = 0.95  # of the seconds one by one, at most, for tasks to run together
UNCLEAR = 0.5  # of these, from where on what one by one takes is measured again, now that it has graphs
AGAIN, COMPARED = 2, 3  # tasks for that; groups before it
MOST_FAILURES = 4  # in a row
DEBT = 4  # costs of graphs that failures may add up to, beyond what was saved
MOST_SIZES = 8  # numbers of tasks at once, each of which takes graphs of its own
MOST_ACCOUNTS = 64  # of one model and loss


class _Rates:
    """Of the graphs of a step and of an objective, and of these for several tasks."""

    def __init__(self) -> None:
        self.recorded, self.mapped = Rate(40e-3), Rate(40e-3)


_rates = _Rates()


@dataclass
class Graphs:
    """Those that there are. recorded: of steps and of an objective. sizes: numbers of tasks that have graphs at once.
    in_vain: seconds that such graphs would have saved, for numbers without."""

    recorded: bool = False
    sizes: set[int] = field(default_factory=set)
    in_vain: Counter[int] = field(default_factory=Counter)


@dataclass(eq=False)
class Account:
    """Tasks of one kind: those that would share graphs.

    steps, wanted: their length, and whether gradients are. graphs: shared by those with gradients and those without.
    nodes: of the autograd graph of a step. alone, together: the least seconds of a task by itself, and at once with
    others. measured, runs: how many of either there were. saved_up: seconds that running together would have saved, or
    did, without those that graphs took. bought: whether tasks run together, which was decided for so many at once:
    size; refused: whether they stay one by one. expected: how many the last call had. again: how often what one by one
    takes is to be measured anew.
    """

    steps: int
    wanted: bool
    graphs: Graphs
    nodes: int = 0
    alone: float = math.inf
    together: float = math.inf
    measured: int = 0
    saved_up: float = 0.0
    bought: bool = False
    refused: bool = False
    failures: int = 0
    size: int = 2
    runs: int = 0
    expected: int = 0
    again: int = AGAIN

    # --- decisions ---------------------------------------------------------------------------------------------

    def pays(self, size: int, left: int) -> bool:
        """Whether the next task runs together with others, as many as `size` at once. left: how many of a list are to
        come, as far as is known."""
        if self.refused:
            return False
        if self.bought:
            return not self._unclear()
        if self.measured < FIRST or not self.nodes:
            return False
        self.bought = self.saved_up + left * self.saved(size) > CAUTION * self.cost(size)
        self.size = size
        return self.bought

    def part(self, count: int, left: int) -> tuple[int, bool]:
        """Of so many tasks that wait, how many to run now, and whether at once. left: as of `pays`, with these."""
        sizes, in_vain, saved = self.graphs.sizes, self.graphs.in_vain, self.saved(count)
        if count in sizes:
            return count, True
        paid = not sizes and count >= self.size / 2  # with what was bought first
        worth = in_vain[count] + max(left, count) * saved
        if count > 1 and len(sizes) < MOST_SIZES and (paid or worth > CAUTION * self._mapping()):
            return count, True
        in_vain[count] += count * saved  # type: ignore[assignment]  # seconds
        known = [size for size in sizes if size <= count]
        return (max(known), True) if known else (count, False)

    def saved(self, size: int) -> float:
        """Seconds that a task takes less with so many at once."""
        if math.isfinite(self.together):
            return max(0.0, self.alone - self.together) if size > 1 else 0.0
        each = (SAVED_PER_EVALUATION + SAVED_PER_NODE * self.nodes) * (1.0 if self.wanted else OF_VALUES)
        return min(SAVED * self.alone, each * (self.steps + 1)) * (1 - 1 / max(1, size))

    def cost(self, size: int) -> float:
        """Seconds that the graphs take which are not there yet; 0: all of them."""
        recording = 0.0 if size and self.graphs.recorded else _rates.recorded.seconds * self.nodes
        return recording + (0.0 if size in self.graphs.sizes else self._mapping()) + self._import()

    def _mapping(self) -> float:
        return _rates.mapped.seconds * self.nodes

    def _import(self) -> float:
        return 0.0 if "torch._dynamo" in sys.modules else IMPORT

    def _unclear(self) -> bool:
        return self.runs >= COMPARED and self.again > 0 and self.together > UNCLEAR * self.alone

    # --- what happened -----------------------------------------------------------------------------------------

    def ran_alone(self, seconds: float, size: int, nodes: int) -> None:
        """A task ran by itself. size: how many might have run at once. nodes: of its steps; 0: not known."""
        self.nodes = nodes or self.nodes
        if self._unclear():
            self.alone = seconds if self.again == AGAIN else min(self.alone, seconds)
            self.again -= 1
            self._compare()
        else:
            self.alone = min(self.alone, seconds)
        self.measured += 1
        self.saved_up += self.saved(size)

    def recorded(self, seconds: float) -> None:
        """Graphs of steps or of an objective were made."""
        if not self.graphs.recorded:
            self.graphs.recorded = True
            _rates.recorded.measured(seconds, self.nodes)
        self.saved_up -= seconds

    def ran(self, count: int, at_once: bool, made: bool, seconds: float) -> None:
        """Tasks ran together. made: by graphs that were not there before. seconds: with their recording."""
        self.failures = 0
        if at_once:
            self.graphs.sizes.add(count)
        if made:
            graphs = max(0.0, seconds - count * max(0.0, self.alone - self.saved(count)))
            _rates.mapped.measured(graphs, self.nodes)
            self.saved_up -= graphs
        elif at_once:
            self.together = min(self.together, seconds / count)
            self.runs += 1
            self.saved_up += count * (self.alone - seconds / count)
            self._compare()

    def failed(self, seconds: float) -> None:
        """Tasks did not run together after all."""
        self.failures += 1
        self.saved_up -= seconds
        if self.failures >= MOST_FAILURES or self.saved_up < -DEBT * self.cost(0):
            self.refused = True

    def _compare(self) -> None:
        """One by one from now on, where that is as fast."""
        if self.runs >= COMPARED and not self._unclear() and self.together > FASTER * self.alone:
            self.refused = True


_accounts: weakref.WeakKeyDictionary[CapturedEvaluator, dict[Hashable, list[Account]]] = weakref.WeakKeyDictionary()


def account_of(f: TrainingFunction, z: Mapping[str, Any], wanted: bool) -> Account | None:
    """That of a task; None where there are too many others."""
    known = _accounts.setdefault(f._evaluator, {})  # type: ignore[arg-type]  # whoever asks has looked
    key = len(f), type(f.optimizer), tuple(z), code_of(f.objective), _shapes(f.batches)
    if key not in known:
        if len(known) >= MOST_ACCOUNTS:
            return None
        graphs = Graphs()
        known[key] = [Account(len(f), each, graphs) for each in (False, True)]
    return known[key][wanted]


def decided(f: TrainingFunction, z: Mapping[str, Any]) -> bool:
    """Whether it is decided how tasks like this one run, with their gradients."""
    account = account_of(f, z, True)
    return account is None or account.bought or account.refused


def _shapes(batches: Any) -> Hashable:
    """Those of the first batch, where nobody's code runs to tell."""
    first = batches[0] if type(batches) in (list, tuple) else None
    if type(first) not in (list, tuple, dict, Tensor):
        return type(first).__qualname__
    tensors, structure = described(first)
    return structure, tuple([(x.shape, x.dtype) for x in tensors])
