"""Which evaluator a training uses, and with whom it shares the graphs."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, nn

from mgd.autodiff.captured import CapturedEvaluator
from mgd.autodiff.eager import EagerEvaluator
from mgd.step.evaluator import Evaluator

# By model, since that is what the trainings of one loss have in common. Nothing here keeps a model or a loss alive.
_shared: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, CapturedEvaluator]] = weakref.WeakKeyDictionary()


def evaluator_for(
    model: nn.Module, loss: Callable[..., Tensor], trace: bool | str | None, compile: bool = False
) -> Evaluator:
    """The evaluator of a training.

    trace: True or "joint": captured at once. None: captured when it pays. False: by autograd. compile: compile the
    captured graph. Trainings of the same model and loss share what was captured, as long as both live.
    """
    if trace is False and not compile:
        return EagerEvaluator()
    at_once = bool(trace or compile)
    evaluator = CapturedEvaluator(EagerEvaluator(), at_once, compile)
    try:
        reference: weakref.ref[Any] = (
            weakref.WeakMethod(loss) if inspect.ismethod(loss) else weakref.ref(loss)
        )  # equal to another one of the same living object
        hash(reference)
    except TypeError:  # it has no weak references, or no hash, as a method of a data class
        return evaluator
    dtypes = frozenset(parameter.dtype for parameter in model.parameters())
    shared = _shared.setdefault(model, {})
    for dead in [key for key in shared if key[0]() is None]:  # type: ignore[index]
        del shared[dead]
    return shared.setdefault((reference, at_once, compile, dtypes), evaluator)
