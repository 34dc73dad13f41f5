"""Graphs of one training, run for many: all at once by a graph that `torch.func.vmap` made of it, or in turn.

A small operator takes as long for a hundred trainings as for one. The graph at once rounds otherwise: a matrix product
for each training becomes one of all of them. Each is compared with the graph it was made of, when it is new.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx

from mgd.autodiff.execution import below_autograd, direct, present, reason
from mgd.autodiff.gathered import NotRecorded
from mgd.autodiff.graphs import changes_inputs, draws, is_symbolic, is_view, traced
from mgd.autodiff.joint import JointGraph
from mgd.autodiff.objectives import ObjectiveGraph
from mgd.autodiff.step_graph import StepGraph
from mgd.util.finite import all_finite

MOST_SIZES = 8  # numbers of trainings, of which each takes a trace
WORTHWHILE = 0.9  # of the operators in turn: with more, a graph at once is made of loops
FEW = 4  # trainings, for which a graph at once is as fast as it is in turn at worst
Rows = list["Tensor | None"]  # `[B, ...]`
Run = Callable[..., tuple["Tensor | None", ...]]
Made = TypeVar("Made")


def why_alone(graph: fx.GraphModule) -> str | None:
    """Why evaluations of a graph cannot be made together, if they cannot."""
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if draws(node):
            return "it draws random numbers, of which each training has its own"
        if isinstance(value, Tensor) and is_symbolic(value):
            return "the sizes of its tensors depend on data"
        if "_local_scalar_dense" in str(node.target):
            return "it reads numbers out of tensors"
        if "as_strided" in str(node.target):  # of several side by side, strides are others
            return "it addresses memory by strides"
    return None


def at_once(module: fx.GraphModule, inputs: Sequence[Tensor], shared: Sequence[bool], tasks: int) -> fx.GraphModule:
    """The graph for trainings whose tensors lie side by side, `[B, ...]`, but for those that they share. The outputs
    are `[B, ...]`, and None where the graph of one has None."""
    (end,) = (node for node in module.graph.nodes if node.op == "output")
    present_ = [isinstance(x, fx.Node) for x in end.args[0]]
    dims = tuple([None if same else 0 for same in shared])

    def one(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple([x for x, there in zip(module(*tensors), present_, strict=True) if there])

    def every(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vmap(one, in_dims=dims)(*tensors)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = traced(every, inputs)
    if changes_inputs(found.graph):
        raise NotRecorded("its graph for several trainings changes what it reads")
    if tasks > FEW and _calls(found) > WORTHWHILE * tasks * _calls(module):
        raise NotRecorded("its operators have no form for several trainings")
    (end,) = (node for node in found.graph.nodes if node.op == "output")
    results = iter(end.args[0])
    end.args = (tuple([next(results) if there else None for there in present_]),)
    found.recompile()
    return found


class Undecided(Exception):
    """Nothing can be told from numbers that are not finite."""


def check(found: Rows, expected: Rows) -> None:
    """Raises NotRecorded where results at once are not those in turn."""
    if not all(all_finite(x) for x in expected if x is not None):
        raise Undecided
    if not rows_agree(found, expected):
        raise NotRecorded("its graph for several trainings has other derivatives than that of one")


def rows_agree(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    """Whether two sets of tensors `[B, ...]` are the same up to rounding, for each training by itself."""
    pairs = [(x, y) for x, y in zip(found, expected, strict=True) if x is not None and y is not None]
    if any((x is None) != (y is None) for x, y in zip(found, expected, strict=True)):
        return False
    if any(x.shape != y.shape or x.dtype != y.dtype for x, y in pairs):
        return False
    limit = math.sqrt(max(torch.finfo(y.dtype).eps for _, y in pairs))
    norms = torch.stack([_norms(y) for _, y in pairs])
    differences = torch.stack([_norms(x.double() - y.double()) for x, y in pairs])
    return bool((differences <= limit * norms + 1e-2 * limit * norms.amax(0)).all())


def _norms(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).double().norm(dim=1)


def _calls(module: fx.GraphModule) -> int:
    """Of operators that compute something."""
    own = [node for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return sum(not is_view(node) for node in own)


def _row(tensors: Sequence[Tensor], shared: Sequence[bool], i: int) -> list[Tensor]:
    return [x if same else x[i] for x, same in zip(tensors, shared, strict=True)]


def _stacked(rows: Sequence[Sequence[Tensor | None]]) -> Rows:
    """Of results of each training, `[B, ...]`."""
    return [None if each[0] is None else torch.stack([present(x) for x in each]) for each in zip(*rows, strict=True)]


class StepsInTurn:
    """A step's graph, run for one training after another. shared: which of the graph's inputs beside the parameters all
    of them have in common."""

    def __init__(self, joint: JointGraph, shared: Sequence[bool], tasks: int):
        self.joint, self.shared, self.tasks = joint, shared, tasks

    def forward(self, parameters: list[Tensor], given: list[Tensor], keep: bool) -> tuple[Tensor, list[Tensor], Any]:
        """The losses `[B]`, the gradients, and what the second derivatives read, where it is kept."""
        own = [False] * len(parameters)
        found = [
            self.joint.forward(
                _row(parameters, own, i), _row(given, self.shared, i), None if keep else 0, compared=keep
            )
            for i in range(self.tasks)
        ]
        gradients = [present(x) for x in _stacked([row[1] for row in found])]
        return torch.stack([row[0] for row in found]), gradients, [row[4] for row in found]

    def second(
        self, parameters: list[Tensor], given: list[Tensor], residuals: Any, directions: list[Tensor]
    ) -> tuple[Rows, Rows, Tensor]:
        """The derivatives of `<gradient, direction>` with respect to parameters and metaparameters, and its values
        `[B]`."""
        own, found = [False] * len(parameters), []
        for i in range(self.tasks):
            inputs = _row(parameters, own, i), _row(given, self.shared, i)
            found += self.joint.hvp_from_residuals(*inputs, residuals[i], [_row(directions, own, i)])
        return split(_stacked(found), len(parameters))


class StepsAtOnce:
    """A step's graph for so many trainings at once."""

    def __init__(self, joint: JointGraph):
        self.joint = joint

    def forward(self, parameters: list[Tensor], given: list[Tensor], keep: bool) -> tuple[Tensor, list[Tensor], Any]:
        losses, gradients, _, _, residuals = self.joint.forward(parameters, given, None if keep else 0, compared=keep)
        return losses, [present(x) for x in gradients], residuals

    def second(
        self, parameters: list[Tensor], given: list[Tensor], residuals: Any, directions: list[Tensor]
    ) -> tuple[Rows, Rows, Tensor]:
        (found,) = self.joint.hvp_from_residuals(parameters, given, residuals, [directions])
        return split(list(found), len(parameters))


Steps = StepsInTurn | StepsAtOnce


def split(results: Rows, parameters: int) -> tuple[Rows, Rows, Tensor]:
    return results[:parameters], results[parameters:-1], present(results[-1])


class _BySize(Generic[Made]):
    """What runs a graph for several trainings at once, by their number and by what they share.

    known: what was made, by those. alone: why evaluations of this kind are not made together, if they are not. in_turn:
    why nothing for several at once could be made, if so.
    """

    def __init__(self, graph: fx.GraphModule):
        self.alone, self.in_turn = why_alone(graph), ""
        self.known: dict[Hashable, Made | None] = {}

    def _of(self, tasks: int, shared: Sequence[bool], make: Callable[[], Made]) -> Made | None:
        key = tasks, tuple(shared)
        if key not in self.known and tasks > 1 and len(self.known) < MOST_SIZES:
            try:
                self.known[key] = make()
            except Undecided:  # the group lets go of its tasks
                return None
            except Exception as error:  # vmap has no rule for everything
                self.known[key] = None
                self.in_turn = str(error) if isinstance(error, NotRecorded) else reason(error)
        return self.known.get(key)


class BatchedSteps(_BySize[StepsAtOnce]):
    """The graphs of one kind of steps, by the number of trainings."""

    def __init__(self, step: StepGraph):
        self.joint = step.joint
        super().__init__(self.joint.graph)
        (end,) = (node for node in self.joint.graph.graph.nodes if node.op == "output")
        if step.written or any(step.moving):
            self.alone = "its steps change buffers of the model"
        elif any(x is None for x in end.args[0][: 1 + self.joint.counts[0]]):
            self.alone = self.alone or "it leaves some parameters without a gradient"

    def runner(
        self, parameters: list[Tensor], given: list[Tensor], shared: Sequence[bool], mapped: bool = True
    ) -> Steps:
        """What evaluates this many trainings at such tensors, which are `[B, ...]` unless shared."""
        plain = StepsInTurn(self.joint, shared, len(parameters[0]))
        if not mapped:
            return plain
        return self._of(plain.tasks, shared, lambda: self._made(plain, parameters, given)) or plain

    def _made(self, plain: StepsInTurn, parameters: list[Tensor], given: list[Tensor]) -> StepsAtOnce:
        joint, own = self.joint, [False] * len(parameters)
        directions = [x.detach() for x in parameters]  # with their strides
        inputs = [*parameters, *given, *directions]
        module = at_once(_without_buffers(joint), inputs, [*own, *plain.shared, *own], plain.tasks)
        made = StepsAtOnce(JointGraph(module, joint.fixed, (*joint.counts[:2], 0), joint.compile))

        def results(steps: Steps) -> Rows:
            losses, gradients, residuals = steps.forward(parameters, given, keep=True)
            first, second, products = steps.second(parameters, given, residuals, directions)
            return [losses, *gradients, *first, *second, products]

        check(results(made), results(plain))
        return made


def _without_buffers(joint: JointGraph) -> fx.GraphModule:
    """The graph without the buffers among its outputs: it leaves them as they are."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(joint.graph.graph, {}))
    (end,) = (node for node in graph.nodes if node.op == "output")
    start = 1 + joint.counts[0] + joint.counts[1]
    end.args = ((*end.args[0][:start], *end.args[0][start + joint.counts[2] :]),)
    return fx.GraphModule(joint.graph, graph)


class BatchedObjectives(_BySize[Run]):
    """The graphs of one kind of objectives, by the number of trainings."""

    def __init__(self, objective: ObjectiveGraph):
        self.objective = objective
        super().__init__(objective.module)

    def __call__(
        self, parameters: list[Tensor], given: list[Tensor], shared: Sequence[bool], mapped: bool = True
    ) -> tuple[Tensor, Rows]:
        """The values `[B]`, and their gradients."""
        tasks, inputs = len(parameters[0]), [*parameters, *given]
        every = [False] * len(parameters) + list(shared)

        def in_turn() -> Rows:
            return _stacked([self.objective(_row(inputs, every, i)) for i in range(tasks)])

        def make() -> Run:
            run = direct(at_once(self.objective.module, inputs, every, tasks))
            with below_autograd():
                check(list(run(*inputs)), in_turn())
            return run

        run = self._of(tasks, shared, make) if mapped else None
        with below_autograd():
            found = in_turn() if run is None else list(run(*inputs))
        return present(found[0]), found[1:]
