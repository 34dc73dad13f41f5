"""One microbatch whose loss is called through a captured graph."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mgd.autodiff.front import CapturedGraph, NotCaptured
from mgd.step.evaluator import Evaluation
from mgd.step.hidden_state import HiddenState
from mgd.step.loss import Microbatch
from mgd.step.model import Buffers, differentiable
from mgd.step.overrides import FunctionOverrides
from mgd.step.written_out import data_of

# In place of an index: a Python number, and a tensor that is no parameter, buffer or metaparameter.
NUMBER, OTHER = -1, -2


def _number(value: bool | int | float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None, device="cpu")


class CapturedStep:
    """The tensors of one microbatch, bound to the model while its loss is called through a graph.

    names: of the buffers, first the `floats` that are differentiated (see `arrange`), then the `others`. z: what the
    loss sees of it. graph: the `StepGraph` that the loss was called through. hidden: what the loss held before, if that
    was new.
    """

    def __init__(self, microbatch: Microbatch, parameters: list[Tensor], before: Buffers):
        self.microbatch, self.parameters, slices = microbatch, parameters, microbatch.metaparameters
        self.metaparameters = list(slices.tensors)
        self._before = before
        self._leaves = microbatch.loss.leaves(parameters)
        self._buffers = {name: b.clone() for name, b in before.items()}
        self._slices = [x.detach().requires_grad_() for x in slices.tensors]
        self.z = slices.owner.rebuilt(self._slices)
        self.loss: Tensor | None = None
        self.evaluation: Evaluation | None = None
        self.graph: Any = None
        self._read: set[str] = set()
        self.hidden: HiddenState | None = None

    @contextlib.contextmanager
    def bound(self):
        """The model holds the tensors. Raises NotCaptured where the loss put others in their places."""
        loss = self.microbatch.loss
        buffers = [self._buffers[name] for name in loss.binding.buffer_names]
        with loss.binding.swapped(self._leaves, buffers), loss.casting():
            yield
            if not loss.binding.holds(buffers):
                raise NotCaptured("the loss replaces a buffer of the model")
            loss.binding.look_at_assigned(self._read)

    def writes(self, graph: CapturedGraph, arguments: Sequence[Any]) -> frozenset[str]:
        """The names of the buffers that a graph of this step writes to."""
        names = {id(b): name for name, b in self._buffers.items()}
        # Copies of all that it reads: a write that nothing counts must not reach the training.
        inputs = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
        copies = {names[id(x)]: copy for x, copy in zip(arguments, inputs, strict=True) if id(x) in names}
        self.microbatch.reseed()
        with self.microbatch.loss.casting(), FunctionOverrides():
            graph.module(*inputs)
        # Through `tensor.data` it may write in some steps and not in others.
        unseen = any(node.target is data_of for node in graph.module.graph.nodes)
        return frozenset(n for n, b in copies.items() if unseen or b._version or not torch.equal(b, self._buffers[n]))

    def arrange(self, written: frozenset[str]) -> None:
        """Differentiate the floating-point buffers that an earlier evaluation or this one writes to."""
        before, wanted = self._before, {*self.microbatch.moved(self._before), *written}
        names = differentiable(before)
        self.moving = tuple([name in wanted for name in names])
        floats = [name for name in names if name in wanted]
        first = set(floats)
        self.names = [*floats, *[name for name in before if name not in first]]
        self.floats = [before[name] for name in floats]
        self.others = [before[name] for name in self.names[len(floats) :]]
        known = [*self._leaves, *(self._buffers[name] for name in self.names), *self._slices]
        self._places = {id(x): i for i, x in enumerate(known)}

    def split(self, arguments: Sequence[Any]) -> tuple[list[Tensor], tuple[int, ...]]:
        """Of a graph's arguments, the tensors that are none of the step's own, and for each argument where it is."""
        assigned = self.microbatch.loss.binding.assigned()
        self._read.update(name for name, x in assigned.items() if any(x is y for y in arguments))
        return places_of(arguments, self._places)

    def note(self, places: tuple[int, ...]) -> None:
        """Which metaparameters the loss reads: those that its graph does."""
        owner, first = self.microbatch.metaparameters.owner, len(self._leaves) + len(self._buffers)
        owner.note({owner.owner[place - first] for place in places if place >= first}, self.microbatch.step)


def places_of(arguments: Sequence[Any], known: dict[int, int]) -> tuple[list[Tensor], tuple[int, ...]]:
    """Of a graph's arguments, the tensors that are none of those known, by id; and for each argument where it is."""
    others: list[Tensor] = []
    places = [known.get(id(argument)) for argument in arguments]
    for i, argument in enumerate(arguments):
        if places[i] is None:
            tensor = isinstance(argument, Tensor)
            places[i] = OTHER if tensor else NUMBER
            others.append(argument.detach() if tensor else _number(argument))
    return others, tuple(places)  # type: ignore[arg-type]  # none is left
