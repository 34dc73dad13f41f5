"""A joint graph with what is around it in a step, and what it keeps of an evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mgd.autodiff.device_recording import Layout, Packed
from mgd.autodiff.execution import derivatives_of
from mgd.autodiff.joint import JointGraph, Residuals
from mgd.errors import ReplayDivergence
from mgd.step.batches import content_of
from mgd.step.evaluator import Derivatives, SecondDerivatives
from mgd.step.metaparameters import BatchMetaparameters


@dataclass(slots=True, eq=False)
class StepGraph:
    """A joint graph, and what is around it. evaluated, batched: see `mgd.autodiff.recorded` and `batched`.

    extras: the number of outputs beside loss and buffers. written: the names of the buffers that it writes to. moving:
    for each floating-point buffer, whether the graph differentiates it; the others are constants, without an adjoint.
    evaluated: whether an evaluation was made of which only its inputs are recorded (`mgd.autodiff.recorded`).
    """

    joint: JointGraph
    extras: int
    written: frozenset[str]
    moving: tuple[bool, ...]
    evaluated: bool = False
    batched: Any = None

    def ways(
        self, directions: Sequence[Sequence[Tensor]], cotangents: Sequence[Sequence[Tensor]]
    ) -> list[tuple[Tensor, ...]]:
        """The directions in which the joint graph is evaluated. cotangents: one a floating-point buffer."""
        if not all(self.moving):
            cotangents = [[x for x, moves in zip(c, self.moving, strict=True) if moves] for c in cotangents]
        return [(*d, *c) for d, c in zip(directions, cotangents, strict=True)]

    def derivatives(self, results: SecondDerivatives, parameters: int) -> Derivatives:
        """From what the joint graph gives for each way; absent for buffers that it does not differentiate."""
        if not all(self.moving):
            rests = [iter(result[parameters:]) for result in results]
            results = [
                [*result[:parameters], *[next(rest) if moves else None for moves in self.moving], *rest]
                for result, rest in zip(results, rests, strict=True)
            ]
        return derivatives_of(results)


@dataclass(slots=True)
class GraphResiduals:
    """What a joint graph computed for the second derivatives of one microbatch.

    given: the graph's inputs beside parameters, of `versions`, the number of times each had been changed in place.
    batch: the microbatch's, of `content`, its bits. tensors: what the graph reads beside them, or the memory of that;
    whoever keeps it may put copies in their place. layout: of the memory. around: who calls the graph, with a look at
    the clock.
    """

    graph: StepGraph
    given: list[Tensor]
    tensors: Sequence[Any]
    versions: list[int]
    metaparameters: BatchMetaparameters
    share: float
    batch: Any
    content: int
    held: int = 0
    layout: Layout | None = None
    around: Callable[[Callable[[], SecondDerivatives]], SecondDerivatives] | None = None

    def second_derivatives(
        self,
        step: int,
        parameters: list[Tensor],
        directions: Sequence[Sequence[Tensor]],
        cotangents: Sequence[Sequence[Tensor]],
    ) -> Derivatives | None:
        if content_of(self.batch) != self.content:
            return None  # a loader fills one piece of memory again and again
        if [x._version for x in self.given] != self.versions:
            raise ReplayDivergence(step, "the tensors of its batch, or metaparameters, were changed in place since.")
        ways = self.graph.ways(directions, cotangents)
        residuals: Residuals = self.tensors if self.layout is None else Packed(self.tensors[0], self.layout)
        evaluate = functools.partial(self.graph.joint.hvp_from_residuals, parameters, self.given, residuals, ways)
        results = evaluate() if self.around is None else self.around(evaluate)
        return self.graph.derivatives(results, len(parameters))
