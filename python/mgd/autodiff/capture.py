"""Which evaluator a training uses."""

from __future__ import annotations

from mgd.autodiff.captured import CapturedEvaluator
from mgd.autodiff.eager import EagerEvaluator
from mgd.step.evaluator import Evaluator


def evaluator_for(trace: bool | str | None, compile: bool) -> Evaluator:
    """The evaluator of a training. It keeps its graphs for as long as it lives.

    trace: True or "joint": captured. False or None: by autograd. When a capture pays depends on the speed of the
    machine, and captured steps may round differently, so that a default which decides by time would break the promise
    of equal bits, of resumed descents among others. compile: compile the captured graph.
    """
    eager = EagerEvaluator()
    return CapturedEvaluator(eager, compile) if trace or compile else eager
