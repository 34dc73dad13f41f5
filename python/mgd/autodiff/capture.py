"""Which evaluator a training uses: by autograd, captured, or the one until the other would have paid."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from mgd.autodiff.captured import CapturedEvaluator
from mgd.autodiff.eager import EagerEvaluator
from mgd.step.evaluator import Derivatives, Evaluation, Evaluator
from mgd.step.loss import Microbatch
from mgd.step.model import Buffers

# To capture a step takes about this long, on one core: 3 to 4 s in Dynamo and 1 to 2 s in the trace of a small model.
SECONDS = 6.0
SAVING = 0.35  # of the time of an eager step, both evaluations: 2.6 to 3 trainings in place of 4


def evaluator_for(trace: bool | str | None, compile: bool) -> Evaluator:
    """The evaluator of a training. It keeps its graphs for as long as it lives.

    trace: False: by autograd. True or "joint": captured. None: by autograd until captured steps would have saved what
    a capture costs, captured from then on. compile: compile the captured graph.
    """
    eager = EagerEvaluator()
    if trace or compile:
        return CapturedEvaluator(eager, compile)
    return eager if trace is False else RentOrBuy()


class RentOrBuy(EagerEvaluator):
    """By autograd, until a capture would have paid. spent: seconds of evaluations so far, in all calls."""

    def __init__(self) -> None:
        super().__init__()
        self.spent = 0.0
        self.captured, self._bought = CapturedEvaluator(self, asked=False), False

    def current(self) -> Evaluator:
        self._bought = SAVING * self.spent >= SECONDS
        return self.captured if self._bought and self.captured.refused is None else self

    def describe(self) -> str:
        if self._bought:
            return self.captured.describe()
        return "eager, until a capture would have paid"

    def gradient(self, microbatch: Microbatch, parameters: list[Tensor], before: Buffers) -> Evaluation:
        start = time.perf_counter()
        evaluation = super().gradient(microbatch, parameters, before)
        self.spent += time.perf_counter() - start
        return evaluation

    def second_derivatives(
        self,
        microbatch: Microbatch,
        parameters: list[Tensor],
        before: Buffers,
        directions: Sequence[Sequence[Tensor]],
        cotangents: Sequence[Sequence[Tensor]],
        expected: Tensor,
    ) -> Derivatives:
        start = time.perf_counter()
        derivatives = super().second_derivatives(microbatch, parameters, before, directions, cotangents, expected)
        self.spent += time.perf_counter() - start
        return derivatives


def repeatable(evaluator: Evaluator) -> Evaluator:
    """The evaluator of a run that another process may continue: one whose choices do not depend on time."""
    return EagerEvaluator() if isinstance(evaluator, RentOrBuy) else evaluator
