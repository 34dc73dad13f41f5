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

# By model, since that is what the trainings of one loss have in common; then by the identity of the loss, which need
# not be hashable. Nothing here keeps a model or a loss alive.
_Shared = dict[Hashable, tuple[weakref.ref[Any], CapturedEvaluator]]
_shared: weakref.WeakKeyDictionary[nn.Module, _Shared] = weakref.WeakKeyDictionary()


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
    evaluator = CapturedEvaluator(at_once, compile)
    owner, method = (loss.__self__, id(loss.__func__)) if inspect.ismethod(loss) else (loss, None)
    try:
        reference = weakref.ref(owner)
    except TypeError:  # it has no weak references
        return evaluator
    dtypes = frozenset(parameter.dtype for parameter in model.parameters())
    shared = _shared.setdefault(model, {})
    for dead in [key for key, (living, _) in shared.items() if living() is None]:
        del shared[dead]
    return shared.setdefault((id(owner), method, at_once, compile, dtypes), (reference, evaluator))[1]
