"""When a capture pays: at once where the training is long enough, else by rent or buy, in measured seconds.

Until a step has a graph it is evaluated by autograd, and every reverse step adds what a graph would have saved to an
account. The step is captured once the account, with what the rest of the current training promises, exceeds what a
capture costs. So whatever number of calls follows, the total is never much more than the better of "never" and "at
once" (ski rental; Karlin et al. 1988). What a graph then takes is measured, too: where autograd with its own graphs
kept was faster, as for convolutions, whose residuals are cut short to save memory, it goes on, as long as memory
allows. All ways give the same bits, so that clocks decide nothing but time. An accelerator tells its own seconds, some
steps late: nobody waits for it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from mgd.autodiff.eager import Look
from mgd.step.autograd_graph import graph_of
from mgd.step.evaluator import Evaluation
from mgd.util.clock import Clock

T = TypeVar("T")
_HOST = torch.device("cpu")

# Of the seconds of both evaluations of a step. Measured: 0.20 (convnets) to 0.35 (GPT-2) where residuals are kept, and
# 0 (GPT-2) to 0.25 (ViT) where they are computed again.
SAVED, SAVED_AT_LEAST = 0.25, 0.05
# Where autograd keeps its graphs: 0.12 (a small GPT) to 0.25 (LoRA).
SAVED_OF_KEPT = 0.15
# Second derivatives, in gradients, as long as none was measured; and where graphs are kept.
SECOND, SECOND_OF_KEPT = 2.4, 1.6
PER_NODE = 20e-3  # seconds of a capture for each node of the loss's autograd graph, as long as none was measured
IMPORT = 2.0  # seconds to import Dynamo
CAUTION = 1.2  # the costs, which may be underestimated, count so much
FIRST = 2  # evaluations by autograd before anything is decided; the very first one warms up
COMPARED = 8  # evaluations by a graph that are measured
FASTER = 0.95  # of a graph's seconds, at most, where autograd goes on


@dataclass
class Account:
    """Steps of one kind: those that would share a graph.

    nodes, bytes: of the autograd graph, whose tensors are about the residuals. gradient, second: the least seconds of
    each evaluation. account: seconds that a graph would have saved. evaluations: in this training. kept: whether
    autograd kept the latest one's graph. by_kept, by_graph: least seconds of both evaluations, where autograd keeps its
    graph, and by a captured one, of which so many were measured.
    """

    nodes: int = 0
    bytes: int = 0
    gradient: float = float("inf")
    second: float = 0.0
    account: float = 0.0
    evaluations: int = 0
    measured: int = 0
    kept: bool = False
    by_kept: list[float] = field(default_factory=lambda: [math.inf] * 2)
    by_graph: list[float] = field(default_factory=lambda: [math.inf] * 2)
    graphs: int = 0


class Payoff:
    """Decides which kinds of steps to capture. captured: seconds that captures took so far. preferred: whether steps of
    this training that have a graph went by autograd."""

    def __init__(self) -> None:
        self.captured, self.preferred = 0.0, False
        self._kinds: dict[Hashable, Account] = {}
        self._ahead = self._seen = self._room = 0
        self._latest: Account | None = None
        self._clock = Clock(_HOST)

    def begin(self, reversals: int, room: int) -> None:
        """A training begins, of which so many evaluations will be reversed. room: bytes for all their residuals."""
        self._ahead, self._seen, self._room = reversals, 0, room
        self.preferred = False
        for kind in self._kinds.values():
            kind.evaluations = 0

    def pays(self, key: Hashable, device: torch.device = _HOST) -> bool:
        """Whether to capture steps of this kind, which are evaluated once more now, on this device."""
        if device != self._clock.device:
            self._clock = Clock(device)
        self._clock.look()
        kind = self._latest = self._kinds.setdefault(key, Account())
        self._seen += 1
        kind.evaluations += 1
        if kind.measured < FIRST:
            return False
        return kind.account + self._promise(kind) > CAUTION * self._cost(kind)

    def _promise(self, kind: Account) -> float:
        """Seconds that a graph would save from this evaluation on in this training."""
        left = max(0, self._ahead - self._seen + 1) * kind.evaluations / self._seen
        return left * self._saved(kind)

    def _saved(self, kind: Account) -> float:
        """Seconds that a graph saves per step, as far as there is room for residuals."""
        if kind.kept:
            return SAVED_OF_KEPT * (kind.gradient + (kind.second or SECOND_OF_KEPT * kind.gradient))
        kept = min(1.0, self._room / (kind.bytes * self._ahead)) if kind.bytes and self._ahead else 1.0
        share = SAVED_AT_LEAST + (SAVED - SAVED_AT_LEAST) * kept
        return share * (kind.gradient + (kind.second or SECOND * kind.gradient))

    def _cost(self, kind: Account) -> float:
        return _rate.seconds * kind.nodes + (0 if "torch._dynamo" in sys.modules else IMPORT)

    def gradient(
        self, key: Hashable, evaluate: Callable[[Look | None], Evaluation], to_keep: bool = True
    ) -> Evaluation:
        """A gradient by autograd, with a look at the clock, and at the first one's graph. to_keep: where there is room
        for that."""
        kind = self._kinds[key]

        def look(loss: Tensor) -> None:
            nodes = list(graph_of(loss))
            kind.nodes, kind.bytes = len(nodes), sum(map(_bytes, nodes))

        def note(seconds: float) -> None:
            kind.gradient = min(kind.gradient, seconds)
            kind.measured += 1
            if kept:
                kind.by_kept[0] = min(kind.by_kept[0], seconds)

        kept = False
        with self._clock.timed(note):
            evaluation = evaluate(None if kind.nodes else look)
            kept = evaluation.residuals is not None
            if to_keep:
                kind.kept = kept
        return evaluation

    def tangents(self, key: Hashable, evaluate: Callable[[Look | None], T]) -> T:
        """An evaluation of forward mode by autograd: all that a graph would have saved goes to the account."""
        kind = self._kinds[key]

        def look(loss: Tensor) -> None:
            kind.nodes = sum(1 for _ in graph_of(loss))

        def note(seconds: float) -> None:
            kind.gradient = min(kind.gradient, seconds / (1 + SECOND))
            kind.measured += 1
            kind.account += self._saved(kind)

        with self._clock.timed(note):
            return evaluate(None if kind.nodes else look)

    def second(self, key: Hashable, evaluate: Callable[[], T], kept: bool = False) -> T:
        """Second derivatives by autograd: what a graph would have saved goes to the account. kept: from a graph that
        autograd kept."""

        def note(seconds: float) -> None:
            if kind := self._kinds.get(key):
                kind.second = min(kind.second or seconds, seconds)
                kind.account += self._saved(kind)
                if kept:
                    kind.by_kept[1] = min(kind.by_kept[1], seconds)

        with self._clock.timed(note):
            return evaluate()

    def by_graph(self, key: Hashable, which: int, evaluate: Callable[[], T]) -> T:
        """An evaluation by a captured graph: 0: a gradient, 1: second derivatives from its residuals."""
        kind = self._kinds.get(key)
        if kind is None or kind.graphs >= 2 * COMPARED:
            return evaluate()

        def note(seconds: float) -> None:
            kind.by_graph[which] = min(kind.by_graph[which], seconds)
            kind.graphs += 1

        with self._clock.timed(note):
            return evaluate()

    def prefers_autograd(self, key: Hashable) -> bool:
        """Whether steps of this kind, which have a graph, are faster by autograd, whose latest graph was kept."""
        kind = self._kinds.get(key)
        prefers = kind is not None and kind.kept and sum(kind.by_kept) < FASTER * sum(kind.by_graph) < math.inf
        self.preferred |= prefers
        return prefers

    def spent(self, key: Hashable, seconds: float) -> None:
        """A capture took so long."""
        self.captured += seconds
        if kind := self._kinds.get(key):
            _rate.measured(seconds, kind.nodes)

    @property
    def nodes(self) -> int:
        """Of the autograd graph of the latest kind of steps that had none of its own; 0 where there was none."""
        return self._latest.nodes if self._latest else 0

    def describe(self) -> str:
        """Why nothing was captured so far."""
        kind = self._latest
        if kind is None or kind.measured < FIRST:
            return "eager"
        cost, each = self._cost(kind), self._saved(kind)
        return f"eager; a capture would take about {cost:.1f} s and save {1e3 * each:.1f} ms per step"


def _bytes(node: Any) -> int:
    """Of the results that an autograd node stands for."""
    metadata = getattr(node, "_input_metadata", ())
    return sum([x.dtype.itemsize * math.prod(map(int, x.shape)) for x in metadata if not x.is_nested_tensor])


@dataclass
class Rate:
    """Seconds of a capture for each node of a loss's autograd graph, in this process. seconds: as long as none was
    measured."""

    seconds: float
    nodes: int = 0
    total: float = 0.0

    def measured(self, seconds: float, nodes: int) -> None:
        if nodes:
            self.total += seconds
            self.nodes += nodes
            self.seconds = self.total / self.nodes


_rate = Rate(PER_NODE)
