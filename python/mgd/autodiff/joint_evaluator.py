"""Steps whose gradients and second derivatives come from one joint graph, which keeps residuals between the two.

A trace freezes whatever Python computed on the way, and here it trains. So the first evaluation of every graph is
compared with the eager one, tensor by tensor, and the loss with the eager one at some later steps (`is_audited`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mgd.autodiff.eager import EagerEvaluator, point_of
from mgd.autodiff.execution import reason, same_loss
from mgd.autodiff.graphs import clean, without_mutation
from mgd.autodiff.joint import JointGraph
from mgd.autodiff.second_order import Point, first_and_second, inspected
from mgd.errors import ReplayDivergence
from mgd.step.agreement import agree
from mgd.step.evaluator import Derivatives, Evaluation, SecondDerivatives
from mgd.step.loss import Microbatch, TensorLoss
from mgd.step.metaparameters import BatchMetaparameters
from mgd.step.model import Buffers


def is_audited(step: int, steps: int) -> bool:
    """Whether the loss of this step is compared with an eager one: the last step, and 16, 64, 256, ..."""
    return step == steps - 1 or (step >= 16 and step & (step - 1) == 0 and step.bit_length() % 2 == 1)


@dataclass(slots=True)
class GraphResiduals:
    """What a joint graph computed for the second derivatives of one microbatch.

    given: the graph's inputs beside parameters, of `versions`, the number of times each had been changed in place.
    """

    graph: JointGraph
    given: list[Tensor]
    tensors: Sequence[Tensor]
    versions: list[int]
    metaparameters: BatchMetaparameters

    @property
    def bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.tensors)

    def second_derivatives(
        self,
        step: int,
        parameters: list[Tensor],
        directions: Sequence[Sequence[Tensor]],
        cotangents: Sequence[Sequence[Tensor]],
    ) -> Derivatives:
        if [x._version for x in self.given] != self.versions:
            raise ReplayDivergence(step, "the tensors of its batch, or metaparameters, were changed in place since.")
        ways = [(*d, *c) for d, c in zip(directions, cotangents, strict=True)]
        return _derivatives(self.graph.hvp_from_residuals(parameters, self.given, self.tensors, ways))


class JointEvaluator:
    """Both evaluations of a step by a joint graph. refused: why the graphs were given up, if they were."""

    def __init__(self, eager: EagerEvaluator, compile: bool = False):
        self.fallback, self.compile = eager, compile
        self.graphs: dict[Hashable, JointGraph] = {}
        self.reads: dict[Hashable, frozenset[str]] = {}  # the metaparameters that the loss read while it was traced
        self.refused: str | None = None

    def describe(self) -> str:
        if self.refused:
            return f"eager, since the joint graph was given up: {self.refused}"
        return "joint, compiled" if self.compile else "joint"

    def refuse(self, reason: str) -> None:
        self.refused = reason

    def gradient(self, microbatch: Microbatch, parameters: list[Tensor], before: Buffers) -> Evaluation:
        if self.refused:
            return self.fallback.gradient(microbatch, parameters, before)
        slices, stack = microbatch.metaparameters, contextlib.ExitStack()
        function = microbatch.of_tensors(before, stack)
        floats = [before[name] for name in function.names[: function.floats]]
        given = [*floats, *slices.tensors, *function.constants]
        key = function.key([*parameters, *given])
        graph, loss = self.graphs.get(key), None
        if graph is None:
            evaluation = self.fallback.gradient(microbatch, parameters, before)
            loss = evaluation.loss
            directions, zeros = [p.clone() for p in parameters], [torch.zeros_like(b) for b in floats]
            point = point_of(microbatch, function, parameters, before, [directions], [zeros])
            with stack:
                graph = self._make(microbatch, function, point, evaluation)
            if graph is None:
                return evaluation
            self.graphs[key] = graph
            self.reads[key] = frozenset(slices.owner.read_at(microbatch.step))
        elif is_audited(microbatch.step, len(microbatch.batches)):
            loss = self.fallback.gradient(microbatch, parameters, before).loss
        slices.owner.note(self.reads[key], microbatch.step)
        microbatch.reseed()
        joint_loss, grads, left, residuals = graph.forward(parameters, given)
        if loss is not None and not same_loss(joint_loss, loss, self.compile):
            raise microbatch.diverged(float(loss), float(joint_loss))
        after = dict(zip(function.names, left, strict=True))
        settled = {name: b if torch.equal(b, after[name]) else after[name] for name, b in before.items()}
        versions = [x._version for x in given]
        return Evaluation(joint_loss, grads, settled, GraphResiduals(graph, given, residuals, versions, slices))

    def second_derivatives(
        self,
        microbatch: Microbatch,
        parameters: list[Tensor],
        before: Buffers,
        directions: Sequence[Sequence[Tensor]],
        cotangents: Sequence[Sequence[Tensor]],
        expected: Tensor,
    ) -> Derivatives:
        if self.refused:
            return self.fallback.second_derivatives(microbatch, parameters, before, directions, cotangents, expected)
        function = microbatch.of_tensors(before, contextlib.ExitStack())
        floats = [before[name] for name in function.names[: function.floats]]
        given = [*floats, *microbatch.metaparameters.tensors, *function.constants]
        graph = self.graphs[function.key([*parameters, *given])]  # it has trained the step
        microbatch.reseed()
        ways = [(*d, *c) for d, c in zip(directions, cotangents, strict=True)]
        loss, results = graph.recompute_hvp(parameters, given, ways)
        if not torch.equal(loss.double().cpu(), expected):
            raise microbatch.diverged(float(expected), float(loss))
        return _derivatives(results)

    def _make(self, microbatch: Microbatch, evaluate: TensorLoss, point: Point, eager: Evaluation) -> JointGraph | None:
        """The graph at a point with one direction, where the eager evaluation is known; None where there is none."""
        kinds = [*point.fixed(), point.directions[0], point.cotangents[0]]
        bounds = list(pairwise(accumulate(map(len, kinds), initial=0)))
        inputs = [x for kind in kinds for x in kind]
        fixed = bounds[3][1]
        counts = [0, 0]

        def function(*tensors: Tensor, evaluate=evaluate) -> tuple[Tensor | None, ...]:
            p, b, z, constants, direction, cotangent = (list(tensors[start:stop]) for start, stop in bounds)
            there = Point(p, b, z, constants, [direction], [cotangent])
            second = first_and_second(evaluate, there)
            counts[:] = len(second.gradient), len(second.buffers)
            return second.loss, *second.gradient, *second.buffers, *second.results[0], second.products[0]

        try:
            microbatch.reseed()
            expected = function(*inputs, evaluate=inspected(evaluate, lambda precision: None))
            microbatch.reseed()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = without_mutation(clean(make_fx(function)(*inputs)), inputs)
                graph = JointGraph(module, fixed, (counts[0], counts[1]), self.compile)
                microbatch.reseed()
                parameters, given = inputs[: len(kinds[0])], inputs[len(kinds[0]) : fixed]
                loss, grads, left, residuals = graph.forward(parameters, given)
                (results,) = graph.hvp_from_residuals(parameters, given, residuals, [inputs[fixed:]])
            if not (
                agree([*grads, *left, *results], expected[1:])
                and agree(grads, eager.gradients)
                and same_loss(loss, eager.loss, self.compile)
            ):
                raise RuntimeError("the graph has other derivatives than the evaluation that it traced")
        except Exception as error:  # whatever stops a trace does not stop the eager evaluation
            self.refused = reason(error)
            return None
        return graph


def _derivatives(results: SecondDerivatives) -> Derivatives:
    """From what a graph gives for each direction."""
    return Derivatives([result[:-1] for result in results], [_present(result[-1]) for result in results])


def _present(product: Tensor | None) -> Tensor:
    assert product is not None  # a graph's last output
    return product
