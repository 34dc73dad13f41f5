"""Objectives as captured graphs: their value, and its gradient with respect to the parameters.

Objectives of the same code, such as functions that one `def` or `lambda` makes for each task, share a graph: Dynamo
looks up in the cells of each what the graph reads.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mgd.autodiff.captured_step import NUMBER, places_of
from mgd.autodiff.execution import below_autograd, direct, present, reason, same_loss
from mgd.autodiff.front import CapturedGraph, Front, NotCaptured, unheard
from mgd.autodiff.gathered import BESIDE, Gathered, NotRecorded, does_nothing_beside
from mgd.autodiff.graphs import changes_inputs, draws, traced
from mgd.step.agreement import agree
from mgd.step.loss import BoundLoss
from mgd.step.model import Binding, Buffers, modes_kept
from mgd.step.overrides import FunctionOverrides
from mgd.step.written_out import data_of
from mgd.util.finite import all_finite

MOST = 2  # graphs of one code and shapes: an objective whose cells hold numbers would have a graph for each task
_Key = tuple[int, tuple[int, ...], Any]  # the graph's number, where its arguments are, and their shapes


class ObjectiveGraph:
    """Value and gradient of an objective. module: of parameters and what else it reads; its outputs are the value, and
    a derivative for each parameter, or None. parameters: how many there are. batched: see `mgd.autodiff.batched`."""

    batched: Any

    def __init__(self, module: fx.GraphModule, parameters: int):
        self.module, self.parameters, self.batched = module, parameters, None
        self._run = direct(module)

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        with below_autograd():
            return self._run(*tensors)


@dataclass(slots=True)
class RecordedObjective:
    """An objective's evaluation that was not made. given: what its graph reads beside the parameters."""

    graph: ObjectiveGraph
    given: list[Tensor]


class _Objectives:
    """Those of one code. sound: those that were run as they are written, too."""

    def __init__(self) -> None:
        self.front = Front(objective=True)
        self.graphs: dict[_Key, ObjectiveGraph] = {}
        self.sound: set[ObjectiveGraph] = set()
        self.refused: str | None = None


class CapturedObjectives:
    """Those of one model, by the code of their functions."""

    def __init__(self) -> None:
        self._known: dict[Hashable, _Objectives] = {}

    @property
    def made(self) -> int:
        """Graphs so far."""
        return sum([len(known.graphs) for known in self._known.values()])

    def recorded(
        self,
        objective: Callable[[nn.Module], Tensor],
        loss: BoundLoss,
        parameters: list[Tensor],
        buffers: Buffers,
        mode: str,
    ) -> RecordedObjective:
        """What the objective's evaluation reads. mode: as of `TrainingFunction.objective_mode`. Raises NotRecorded."""
        code = code_of(objective)
        if code not in self._known:
            self._known[code] = _Objectives()
        known = self._known[code]
        if why := known.refused or unheard():
            raise NotRecorded(why)
        model, leaves = loss.binding.model, loss.leaves(parameters)
        tensors = [buffers[name] for name in loss.binding.buffer_names]

        def gather(graph: CapturedGraph, arguments: Sequence[Any]) -> Any:
            others, places = places_of(arguments, {id(x): i for i, x in enumerate([*leaves, *tensors])})
            given = [*tensors, *others]
            key: _Key = graph.number, places, tuple([(x.shape, x.stride(), x.dtype) for x in given])
            if key not in known.graphs:
                if sum(key[1:] == others[1:] for others in known.graphs) >= MOST:
                    raise NotCaptured("the objective is another function for each task: let it close over tensors")
                known.graphs[key] = _graph(graph.module, places, parameters, given)
            raise Gathered(known.graphs[key], given)

        def check(graph: CapturedGraph, arguments: Sequence[Any]) -> Sequence[Any]:
            return graph.module(*arguments)

        def call(run: Callable[[CapturedGraph, Sequence[Any]], Any]) -> Gathered | None:
            try:
                known.front(objective, model, None, None, run)
            except Gathered as found:
                return found
            return None

        with _in_mode(loss.binding, mode):
            try:
                with loss.binding.swapped(leaves, tensors):
                    found = call(gather)
                    if known.front.code is None:  # a capture does not say what code it has made
                        found = call(gather)
                    assert found is not None
                    if found.graph not in known.sound:
                        if known.front.code is None or not does_nothing_beside(known.front.code, modes=True):
                            raise NotCaptured(BESIDE.format("the objective"))
                        call(check)  # what the objective returns is the result of its graph
                if found.graph not in known.sound:
                    _compare(objective, loss, parameters, buffers, found)
                    known.sound.add(found.graph)
            except NotRecorded:
                raise
            except Exception as error:  # what stops a capture does not stop the objective
                known.refused = str(error) if isinstance(error, NotCaptured) else reason(error)
                raise NotRecorded(known.refused) from None
        return RecordedObjective(found.graph, found.given)


def _compare(
    objective: Callable[[nn.Module], Tensor],
    loss: BoundLoss,
    parameters: Sequence[Tensor],
    buffers: Buffers,
    found: Gathered,
) -> None:
    """Raises NotCaptured where the objective as it is written has another value, or gradient, than its graph, and
    NotRecorded where these are not finite, which does not tell."""
    if any(draws(node) for node in found.graph.module.graph.nodes):
        return  # which nobody makes together
    leaves = [p.detach().requires_grad_() for p in parameters]
    copies = {name: b.clone() for name, b in buffers.items()}
    with contextlib.ExitStack() as until:
        value = loss.binding.call(objective, leaves, copies, until=until)[0]
        expected = torch.autograd.grad(value, leaves, allow_unused=True)
    if not all(all_finite(x) for x in (value, *expected) if x is not None):
        raise NotRecorded("the objective is not finite")
    own, *gradients = found.graph([x.detach() for x in (*parameters, *found.given)])
    limit = math.sqrt(torch.finfo(value.dtype).eps)
    if not (torch.allclose(present(own), value.detach(), rtol=limit, atol=0.0) and agree(gradients, expected)):
        raise NotCaptured("the objective's graph has another value than the objective")


@contextlib.contextmanager
def _in_mode(binding: Binding, mode: str) -> Iterator[None]:
    """The model in the mode of an objective. What `nn.Module.eval` sets is set directly, in a tenth of the time."""
    if mode == "eval" and all(type(x).train is _TRAIN and type(x).eval is _EVAL for x in binding.modules):
        attributes = [vars(module) for module in binding.modules]
        before = [each["training"] for each in attributes]
        try:
            for each in attributes:
                each["training"] = False
            yield
        finally:
            for each, training in zip(attributes, before, strict=True):
                each["training"] = training
        return
    with modes_kept(binding.model):
        if mode == "eval":
            binding.model.eval()
        yield


_TRAIN, _EVAL = nn.Module.train, nn.Module.eval


def code_of(objective: Any) -> Hashable:
    """What objectives have in common that may share graphs."""
    function: Any = objective.__func__ if inspect.ismethod(objective) else objective
    kind: Any = type(function)
    code: Any = getattr(function, "__code__", None)
    return kind if code is None else code


def _graph(
    captured: fx.GraphModule, places: tuple[int, ...], parameters: Sequence[Tensor], given: Sequence[Tensor]
) -> ObjectiveGraph:
    """The objective's graph at these tensors. Raises NotCaptured."""
    if NUMBER in places:
        raise NotCaptured("the objective reads numbers: let it close over tensors")
    if any(node.target is data_of for node in captured.graph.nodes):
        raise NotCaptured("the objective reads tensor.data")
    count = len(parameters)

    def function(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        p = [x.detach().requires_grad_() for x in tensors[:count]]
        known = [*p, *tensors[count:]]
        rest = iter(tensors[count + len(given) - sum(place < 0 for place in places) :])
        overrides = FunctionOverrides(formulas=False)
        with overrides:
            found = captured(*[known[place] if place >= 0 else next(rest) for place in places])
        if len(found) != 1 or found[0].ndim or not found[0].is_floating_point() or not found[0].requires_grad:
            raise NotCaptured("the objective is no differentiable number that its graph computes")
        if overrides.written(p):
            raise NotCaptured("the objective changes parameters")
        return found[0].detach(), *torch.autograd.grad(found[0], p, allow_unused=True)

    inputs = [x.detach() for x in (*parameters, *given)]
    copies = [x.clone() for x in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = function(*copies)
        if any(x._version for x in copies) or all(g is None for g in expected[1:]):
            raise NotCaptured("the objective changes what it reads, or does not depend on the parameters")
        module = traced(function, inputs)
    if changes_inputs(module.graph):
        raise NotCaptured("the objective changes what it reads")
    graph = ObjectiveGraph(module, count)
    found = graph(inputs)
    if not (agree(found[1:], expected[1:]) and same_loss(present(found[0]), present(expected[0]), compiled=False)):
        raise NotCaptured("its graph has other derivatives than the objective that it traced")
    return graph
