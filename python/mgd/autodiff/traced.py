"""Second derivatives traced once into a graph of torch operators, cleaned, and replayed at every step.

Replaying a graph leaves out autograd's bookkeeping, and dead code can be eliminated: the gradient of the weights, for
one, is part of the graph of the gradient but not needed by its derivative (one matmul in nine for a linear layer).

A trace freezes whatever Python computed on the way. So nothing rests on it alone: training gradients are never
traced, every replayed loss is compared with the one of the eager first sweep, and a graph that differs is given up.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mgd.autodiff.accumulation import accumulate_products
from mgd.autodiff.eager import EagerEvaluator, point_of
from mgd.autodiff.execution import below_autograd, derivatives_of, reason
from mgd.autodiff.graphs import PerDirection, clean, without_mutation
from mgd.autodiff.second_order import Point
from mgd.step.agreement import agree
from mgd.step.evaluator import Derivatives, Evaluation
from mgd.step.loss import Microbatch, TensorLoss
from mgd.step.model import Buffers

# graph(fixed inputs, directions) -> (loss, the second derivatives for each direction)
Graph = Callable[[Sequence[Tensor], Sequence[Sequence[Tensor]]], tuple[Tensor, Sequence[Sequence["Tensor | None"]]]]


MOST_GRAPHS = 16  # of one training function: shapes that hardly repeat are not worth a trace each


class TracedEvaluator:
    """Gradients by autograd, second derivatives by graphs.

    after: evaluations of one kind (shapes, modes, structure) that are eager before a graph of it is traced. refused:
    why tracing was given up, if it was.
    """

    def __init__(self, eager: EagerEvaluator, after: int = 0):
        self.fallback, self.after = eager, after
        self.graphs: dict[Hashable, Graph] = {}
        self.refused: str | None = None
        self._evaluations: Counter[Hashable] = Counter()

    def describe(self) -> str:
        if not self.refused and not self.graphs:
            return f"eager; traced after {self.after} evaluations of one shape"
        if self.refused:
            return f"eager, since tracing was given up: {self.refused}"
        return "traced"

    def refuse(self, reason: str) -> None:
        self.refused = reason

    def gradient(self, microbatch: Microbatch, parameters: list[Tensor], before: Buffers) -> Evaluation:
        return self.fallback.gradient(microbatch, parameters, before)

    def second_derivatives(
        self,
        microbatch: Microbatch,
        parameters: list[Tensor],
        before: Buffers,
        directions: Sequence[Sequence[Tensor]],
        cotangents: Sequence[Sequence[Tensor]],
        expected: Tensor,
    ) -> Derivatives:
        with contextlib.ExitStack() as stack:
            function = microbatch.of_tensors(before, stack)
            point = point_of(microbatch, function, parameters, before, directions, cotangents)
            results = self._replay(microbatch, function, point, expected)
            return results or self.fallback.at(microbatch, function, point, expected)

    def _replay(
        self, microbatch: Microbatch, function: TensorLoss, point: Point, expected: Tensor
    ) -> Derivatives | None:
        """The second derivatives by a graph; None where there is none, or where its loss is not `expected`."""
        if self.refused:
            return None
        inputs = [x for kind in point.fixed() for x in kind]
        key = function.key(inputs), len(point.directions) > 1
        graph = self.graphs.get(key)
        if graph is None:
            self._evaluations[key] += 1
            if self._evaluations[key] <= self.after or len(self.graphs) >= MOST_GRAPHS:
                return None
            try:
                graph = self.graphs[key] = self._trace(microbatch, function, point)
            except Exception as error:  # whatever stops a trace does not stop the eager evaluation
                self.refused = reason(error)
                return None
        microbatch.reseed()
        directions = [(*d, *c) for d, c in zip(point.directions, point.cotangents, strict=True)]
        try:
            with below_autograd():
                loss, results = graph(inputs, directions)
        except RuntimeError as error:  # a size that depends on data, frozen in the trace, fits no longer
            self.refused = reason(error)
            return None
        if not torch.equal(loss.double().cpu(), expected):
            self.refused = (
                f"the replayed loss of step {microbatch.step} is {float(loss.detach())!r}, "
                f"that of training {float(expected)!r}"
            )
            return None
        return derivatives_of(results)

    def _trace(self, microbatch: Microbatch, evaluate: TensorLoss, point: Point) -> Graph:
        """The graph of the point's first direction, as a function of fixed inputs and of any number of directions."""
        kinds = [*point.fixed(), point.directions[0], point.cotangents[0]]
        bounds = list(pairwise(accumulate(map(len, kinds), initial=0)))
        inputs = [x for kind in kinds for x in kind]
        shared = bounds[3][1]

        def function(*tensors: Tensor) -> tuple[Tensor | None, ...]:
            p, b, z, constants, direction, cotangent = (list(tensors[start:stop]) for start, stop in bounds)
            second = self.fallback.evaluate(evaluate, Point(p, b, z, constants, [direction], [cotangent]))
            return second.loss, *second.results[0], second.products[0]

        microbatch.reseed()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = clean(make_fx(function)(*inputs))
            replay: Graph
            if len(point.directions) > 1:
                replay = PerDirection(without_mutation(graph, inputs), shared, accumulate_products)
            else:
                replay = _whole(graph)
            microbatch.reseed()
            _, (replayed,) = replay(inputs[:shared], [inputs[shared:]])
        microbatch.reseed()
        if not agree(replayed, function(*inputs)[1:]):
            raise RuntimeError("the replayed graph has other second derivatives than the evaluation that it traced")
        return replay


def _whole(graph: fx.GraphModule) -> Graph:
    """The graph for a single direction."""
    whole = accumulate_products(graph, exact=1)

    def replay(fixed: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]):
        loss, *result = whole(*fixed, *directions[0])
        return loss, [result]

    return replay
