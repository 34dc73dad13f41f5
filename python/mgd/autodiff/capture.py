"""Which evaluator a training uses."""

from __future__ import annotations

from mgd.autodiff.eager import EagerEvaluator
from mgd.autodiff.joint_evaluator import JointEvaluator
from mgd.autodiff.traced import TracedEvaluator
from mgd.step.evaluator import Evaluator

WORTH_TRACING = 32  # evaluations; a trace takes as long as some 10 to 30 of them


def evaluator_for(trace: bool | str | None, compile: bool, evaluations: int) -> Evaluator:
    """The evaluator of a training of so many evaluations. It keeps its graphs for as long as it lives.

    trace: None (where the training is long enough to win back the time of the trace), False, True or "joint".
    compile: compile the joint graph.
    """
    eager = EagerEvaluator()
    if trace == "joint" or compile:
        return JointEvaluator(eager, compile)
    if evaluations >= WORTH_TRACING if trace is None else trace:
        return TracedEvaluator(eager)
    return eager
