"""A joint graph with what is around it in a step, and what it keeps of an evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mgd.autodiff.captured_step import CapturedStep
from mgd.autodiff.derived import Along
from mgd.autodiff.device_recording import Layout, Packed
from mgd.autodiff.eager import DETACHED
from mgd.autodiff.execution import derivatives_of, present
from mgd.autodiff.joint import JointGraph, Residuals
from mgd.errors import BadLoss, ReplayDivergence
from mgd.step.batches import content_of
from mgd.step.evaluator import Derivatives, Direction, Evaluation, SecondDerivatives, Tangents
from mgd.step.metaparameters import BatchMetaparameters
from mgd.step.model import Buffers


@dataclass(slots=True, eq=False)
class StepGraph:
    """A joint graph, and what is around it. evaluated, batched: see `mgd.autodiff.recorded` and `batched`.

    extras: the number of outputs beside loss and buffers. written: the names of the buffers that it writes to. moving:
    for each floating-point buffer, whether the graph differentiates it; the others are constants, without an adjoint.
    along: of a graph of forward mode, for each metaparameter, whether it moves. compared: whether it was seen to give
    what the loss gives as it is written. beside: whether its loss changes something beside. evaluated: whether an
    evaluation was made of which only its inputs are recorded (`mgd.autodiff.recorded`).
    """

    joint: JointGraph
    extras: int
    written: frozenset[str]
    moving: tuple[bool, ...]
    along: Along | None = None
    compared: bool = False
    beside: bool = False
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

    def buffers_after(
        self, step: CapturedStep, before: Buffers, left: Sequence[Tensor]
    ) -> tuple[Buffers, Sequence[Tensor]]:
        """From what the graph leaves of the step's buffers, those after it, and the outputs beside."""
        count = len(left) - self.extras
        after = dict(zip(step.names, left[:count], strict=True))
        return {name: after[name] if name in self.written else b for name, b in before.items()}, left[count:]

    def tangents(
        self, step: CapturedStep, given: list[Tensor], before: Buffers, directions: Sequence[Direction]
    ) -> tuple[Tangents, Sequence[Tensor]]:
        """What a graph of forward mode computes, and its outputs beside."""
        assert self.along is not None
        count, ways = len(step.parameters), []
        for d in directions:
            buffers = [x for x, moves in zip(d.buffers, self.moving, strict=True) if moves]
            leaves = zip(d.metaparameters, step.metaparameters, self.along, strict=True)
            moved = [torch.zeros_like(z) if x is None else x for x, z, moves in leaves if moves]
            ways.append((*d.parameters, *buffers, *moved))
        loss, outputs, results = self.joint.recompute_hvp(step.parameters, given, ways)
        grads, left = outputs[:count], [present(x) for x in outputs[count:]]
        if all(g is None for g in grads):
            raise BadLoss(DETACHED.format(step.microbatch.step))
        after, rest = self.buffers_after(step, before, left)
        floats = []
        for d, result in zip(directions, results, strict=True):
            own = iter(result[count:-1])
            pairs = zip(d.buffers, self.moving, strict=True)
            floats.append([present(next(own)) if moves else x for x, moves in pairs])
        gradients, losses = [result[:count] for result in results], [present(result[-1]) for result in results]
        return Tangents(Evaluation(loss, grads, after), losses, gradients, floats), rest


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
