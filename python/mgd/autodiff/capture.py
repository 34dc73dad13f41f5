"""Which evaluator a training uses."""

from __future__ import annotations

from mgd.autodiff.captured import CapturedEvaluator
from mgd.autodiff.eager import EagerEvaluator
from mgd.autodiff.traced import TracedEvaluator
from mgd.step.evaluator import Evaluator

# Evaluations of one shape that win back a trace. It costs about 5 ms for each node of the autograd graph, and saves
# about 15 us for each at every replay. Of larger steps it saves more, so that this number is never too small for them.
WORTH_TRACING = 200


def evaluator_for(trace: bool | str | None, compile: bool, evaluations: int) -> Evaluator:
    """The evaluator of a training of so many evaluations. It keeps its graphs for as long as it lives.

    trace: False, True or "joint"; None: traced at once where this training alone wins back the trace, and otherwise
    after as many evaluations as would have. compile: compile the joint graph.
    """
    eager = EagerEvaluator()
    if trace == "joint" or compile:
        return CapturedEvaluator(eager, compile)
    if trace is False:
        return eager
    at_once = trace is True or evaluations >= WORTH_TRACING
    return TracedEvaluator(eager, 0 if at_once else WORTH_TRACING)


def repeatable(evaluator: Evaluator) -> Evaluator:
    """The evaluator of a run that another process may continue: one that does not depend on earlier calls."""
    if isinstance(evaluator, TracedEvaluator) and evaluator.after:
        return evaluator.fallback
    return evaluator
