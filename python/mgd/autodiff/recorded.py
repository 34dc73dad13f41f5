"""Steps whose evaluations are recorded, not made: so that those of many trainings can be made at once.

Of many evaluations of a loss that does something beside, each may depend on what the ones before it have left. Those
are not recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mgd.autodiff.captured import CapturedEvaluator
from mgd.autodiff.captured_step import CapturedStep
from mgd.autodiff.gathered import BESIDE, Gathered, NotRecorded, does_nothing_beside
from mgd.autodiff.step_graph import GraphResiduals, StepGraph
from mgd.step.loss import Microbatch
from mgd.step.metaparameters import BatchMetaparameters
from mgd.step.model import Buffers


@dataclass(slots=True, eq=False)
class RecordedStep:
    """A step's evaluation that was not made. given: what its graph reads beside the parameters: metaparameters, buffers
    and other tensors."""

    graph: StepGraph
    given: list[Tensor]
    metaparameters: BatchMetaparameters


def recorded_step(
    evaluator: CapturedEvaluator, microbatch: Microbatch, parameters: list[Tensor], before: Buffers
) -> RecordedStep:
    """What the step's evaluation reads. Raises NotRecorded."""
    kind = evaluator.kind_of(microbatch)
    if kind is None:
        raise NotRecorded(_BY_AUTOGRAD, told=True)
    step = CapturedStep(microbatch, parameters, before)

    def gather(graph: StepGraph, given: list[Tensor]) -> Any:
        raise Gathered(graph, given)

    def gathered() -> Gathered:
        try:
            evaluator.call(kind, step, gather)
        except Gathered as found:
            return found
        raise NotRecorded(_BY_AUTOGRAD, told=True)

    found = gathered()
    if evaluator.code_of(kind) is None:  # a capture does not say what code it has made
        found = gathered()
    code, graph = evaluator.code_of(kind), found.graph
    if code is None or not does_nothing_beside(code):
        raise NotRecorded(BESIDE.format("the loss"))
    if not (graph.evaluated and evaluator.trusts(kind)):
        # The evaluation proper looks at what the loss returns. By default, a new graph is compared with autograd.
        residuals = evaluator.gradient(microbatch, parameters, before, now=True).residuals
        if not evaluator.trusts(kind):
            raise NotRecorded(_BY_AUTOGRAD, told=True)
        if graph.extras or not (isinstance(residuals, GraphResiduals) and residuals.graph is graph):
            raise NotRecorded("the loss is more than its graph computes")
        graph.evaluated = True
    return RecordedStep(graph, found.given, microbatch.metaparameters)


_BY_AUTOGRAD = "steps are evaluated by autograd"
