"""Steps whose gradients and second derivatives come from one graph, which keeps residuals between the two.

Dynamo captures the loss (`front`). Its graph, with gradient and second derivatives, is traced with fake tensors into a
joint graph, whose parts are run (`joint`). Every new joint graph is compared once with the captured one run by
autograd: loss, gradients, second derivatives. Where anything of this fails, the step is evaluated by autograd, as all
later ones are.

A joint graph runs the operators of the eager evaluation in the same order, and so gives its bits. One that was seen to
give other ones is used where it was asked for, and not where it was chosen for its speed (`payoff`).
"""

from __future__ import annotations

import functools
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mgd.autodiff.captured_step import CapturedStep
from mgd.autodiff.derived import ROUNDS, Along, derive
from mgd.autodiff.device_graphs import DeviceGraphs
from mgd.autodiff.device_recording import Packed
from mgd.autodiff.eager import DETACHED, EagerEvaluator
from mgd.autodiff.execution import LOSS_TOLERANCE, reason, same_evaluation, same_tangents, same_up_to_rounding
from mgd.autodiff.front import MOST_GRAPHS, CapturedGraph, Front, Methods, NotCaptured, methods_of, unheard
from mgd.autodiff.gathered import does_nothing_beside
from mgd.autodiff.kept_graph import AutogradResiduals
from mgd.autodiff.objectives import CapturedObjectives
from mgd.autodiff.payoff import Payoff
from mgd.autodiff.step_graph import GraphResiduals, StepGraph
from mgd.errors import BadLoss, MetagradientError, ReplayDivergence
from mgd.step.batches import content_of, described
from mgd.step.evaluator import Derivatives, Direction, Evaluation, Tangents
from mgd.step.hidden_state import HiddenState
from mgd.step.loss import Microbatch
from mgd.step.model import Buffers
from mgd.util.system import return_freed_memory

UNLIKE = "its graph has other derivatives than the loss as it is written"
MOST_FAILURES = 4  # to capture steps of a kind that had a graph, each as long as a capture

T = TypeVar("T")

# The structure of the batch and of z (Dynamo does not guard that a key is missing), the microbatch's share, shapes; of
# forward mode, which metaparameters move.
Kind = tuple[str, str, float, tuple[torch.Size, ...], Along | None]


class CapturedEvaluator:
    """Both evaluations of a step by a captured graph.

    at_once: capture every step that can be; otherwise those for which it pays. refused: why that was given up for all
    steps, if it was. left_out: why it was for some, whose graphs would have been too many. fallback: expects the losses
    of graphs, which round differently where they were rewritten.
    """

    def __init__(self, at_once: bool, compile: bool = False):
        self.at_once, self.compile, self._warned = at_once, compile, False
        self.eager = EagerEvaluator()
        self.fallback = EagerEvaluator(rounds=True) if at_once else self.eager
        self.payoff = Payoff()
        self.graphs: dict[Hashable, StepGraph] = {}
        self.refused: str | None = None
        self.left_out: str | None = None
        self._writes: dict[Hashable, frozenset[str]] = {}  # of each graph of a front
        self._fronts: dict[tuple[str, str], Front] = {}
        self._served: set[Kind] = set()  # kinds of steps that had a graph, and that had none
        self._failed: set[Kind] = set()
        self._failures: Counter[Kind] = Counter()
        self.objectives = CapturedObjectives()
        self.on_device = DeviceGraphs()
        self._methods: Methods = []
        self._looked = False  # whether the model's classes are those that were captured, in this training

    @property
    def made(self) -> int:
        """Graphs of steps and of objectives so far."""
        return len(self.graphs) + self.objectives.made

    @property
    def capture_seconds(self) -> float:
        return self.payoff.captured

    @property
    def residual_bytes(self) -> int:
        kept = [graph.joint.residual_bytes for graph in self.graphs.values() if graph.along is None]
        return 0 if self.refused else max(kept, default=0)

    def begin(self, reversals: int, room: int) -> None:
        self._looked = False
        self.payoff.begin(reversals, room)
        self.eager.begin(reversals, room)

    def describe(self) -> str:
        if self.refused:
            return f"eager, since capture was given up: {self.refused}"
        if not self.graphs and not self.at_once:
            return self.payoff.describe()
        captured = "captured, compiled" if self.compile else f"captured{self.on_device.describe()}"
        if self.payoff.preferred:
            captured += "; by autograd where that is faster"
        return f"{captured}; some steps eager: {self.left_out}" if self.left_out else captured

    def refuse(self, reason: str) -> None:
        self.refused = reason
        self.eager.refuse(reason)

    def gradient(
        self, microbatch: Microbatch, parameters: list[Tensor], before: Buffers, *, room: int | None = None, now=False
    ) -> Evaluation:
        """now: by a graph, whether or not that pays by itself."""
        step: CapturedStep | None = None

        def forward(graph: StepGraph, given: list[Tensor]) -> tuple[Tensor, Sequence[Any]]:
            assert step is not None
            joint = graph.joint
            compared = microbatch.loss.compared or not graph.compared
            loss, grads, influence, left, residuals = joint.forward(parameters, given, room, compared)
            if all(g is None for g in grads):
                raise BadLoss(DETACHED.format(microbatch.step))
            buffers, rest = graph.buffers_after(step, before, left)
            if residuals is None:
                step.evaluation = Evaluation(loss, grads, buffers, influence, not_kept=joint.residual_bytes)
            else:
                of = [x._version for x in given], microbatch.metaparameters, microbatch.share
                layout = residuals.layout if isinstance(residuals, Packed) else None
                tensors = [residuals.memory] if isinstance(residuals, Packed) else residuals
                content = content_of(microbatch.batch)
                kept = GraphResiduals(graph, given, tensors, *of, microbatch.batch, content, layout=layout)
                step.evaluation = Evaluation(loss, grads, buffers, influence, kept)
            return loss, rest

        kind = self.kind_of(microbatch)
        if kind is None:
            return self.eager.gradient(microbatch, parameters, before, room=room)
        known = self.trusts(kind)
        decided = known and not self.at_once and not now
        if decided and room != 0 and self.payoff.prefers_autograd(kind):
            return self._by_autograd(kind, microbatch, parameters, before, room)
        if not known and not now and not self.payoff.pays(kind, parameters[0].device):
            return self._by_autograd(kind, microbatch, parameters, before, room)
        step = CapturedStep(microbatch, parameters, before)
        call = functools.partial(self.call, kind, step, forward)
        if not (self.payoff.by_graph(kind, 0, call) if decided else call()):
            return self.eager.gradient(microbatch, parameters, before, room=room)
        assert step.evaluation is not None
        by_autograd = functools.partial(self.eager.gradient, microbatch, parameters, before, room=0)
        same = same_up_to_rounding if self.at_once else same_evaluation
        if other := self._as_written(kind, step, step.evaluation, by_autograd, same):
            return other
        if decided and isinstance(step.evaluation.residuals, GraphResiduals):
            step.evaluation.residuals.around = functools.partial(self.payoff.by_graph, kind, 1)
        return step.evaluation

    def _as_written(
        self, kind: Kind, step: CapturedStep, found: T, by_autograd: Callable[[], T], same: Callable[[T, T], bool]
    ) -> T | None:
        """What autograd gives, where a new graph gave something else: what Dynamo sees of a loss may be another one
        than what runs without it. A model that counts its calls counts one. Raises ReplayDivergence where autograd
        gives something else each time."""
        graph, loss, hidden = step.graph, step.microbatch.loss, step.hidden
        if self._settled(graph):
            return None
        codes = self._fronts[kind[:2]].codes
        alone = bool(codes) and all(map(does_nothing_beside, codes))
        if self.at_once and not alone:
            graph.beside = True  # where it was asked for, a loss that counts is not called twice for that
            return None
        assert hidden is not None
        after = HiddenState(loss.binding, loss.function)
        hidden.put_back()
        plain = by_autograd()
        graph.compared = same(found, plain)
        if graph.compared:
            after.put_back()
            return None
        if not alone:  # whether what it keeps has been put back
            hidden.put_back()
            if not same(plain, by_autograd()):
                raise ReplayDivergence(
                    step.microbatch.step,
                    "the loss is another one each time it is called: it reads something that it changes, such as a "
                    "count or a list. Keep that in a buffer of the model, or take it from the batch.",
                )
        self._served.discard(kind)
        self._give_up(kind, UNLIKE if self.at_once else ROUNDS)
        return plain

    def _settled(self, graph: StepGraph) -> bool:
        """Whether there is nothing more to compare of a graph."""
        return graph.compared or (self.at_once and graph.beside)

    def _by_autograd(
        self, kind: Kind, microbatch: Microbatch, parameters: list[Tensor], before: Buffers, room: int | None
    ) -> Evaluation:
        """A gradient of a kind that may be captured: the clock looks at both evaluations."""
        evaluation = self.payoff.gradient(
            kind, lambda look: self.eager.gradient(microbatch, parameters, before, look, room=room), room != 0
        )
        if isinstance(evaluation.residuals, AutogradResiduals):
            evaluation.residuals.around = functools.partial(self.payoff.second, kind, kept=True)
        return evaluation

    def kind_of(self, microbatch: Microbatch, along: Along | None = None) -> Kind | None:
        """What steps have in common that may share a graph; None for those that have none. along: of forward mode."""
        if not self._looked:
            self._looked = True
            self._look_at(microbatch.loss.binding.model, microbatch.loss.function)
        if self.refused:
            return None
        if why := unheard():
            self.left_out = why
            return None
        tensors, structure = described(microbatch.batch)
        shapes = tuple([x.shape for x in tensors])
        kind: Kind = structure, microbatch.metaparameters.structure, microbatch.share, shapes, along
        return None if kind in self._failed else kind

    def second_derivatives(
        self,
        microbatch: Microbatch,
        parameters: list[Tensor],
        before: Buffers,
        directions: Sequence[Sequence[Tensor]],
        cotangents: Sequence[Sequence[Tensor]],
        expected: Tensor,
    ) -> Derivatives:
        found: Derivatives | None = None

        def recompute(graph: StepGraph, given: list[Tensor]) -> tuple[Tensor, Sequence[Any]]:
            nonlocal found
            joint, ways, rest = graph.joint, graph.ways(directions, cotangents), []
            if graph.extras:
                loss, _, influence, left, residuals = joint.forward(parameters, given)
                assert residuals is not None
                results, rest = joint.hvp_from_residuals(parameters, given, residuals, ways), left[-graph.extras :]
            else:
                loss, influence, results = joint.recompute_hvp(parameters, given, ways)
            found = graph.derivatives(results, len(parameters))
            found.influence = influence
            return loss, rest

        kind = self.kind_of(microbatch)
        if kind is not None and (self.at_once or kind in self._served):
            step = CapturedStep(microbatch, parameters, before)
            if self.call(kind, step, recompute):
                assert found is not None and step.loss is not None
                # Compiled, it is the loss of another graph than the first one.
                microbatch.expect(step.loss, expected, LOSS_TOLERANCE if self.compile else 0.0)
                return found
        arguments = microbatch, parameters, before, directions, cotangents, expected
        plain = self.fallback if kind in self._served else self.eager
        return self.payoff.second(kind, lambda: plain.second_derivatives(*arguments))

    def tangents(
        self, microbatch: Microbatch, parameters: list[Tensor], before: Buffers, directions: Sequence[Direction]
    ) -> Tangents:
        """By a graph of its own, once that pays."""
        found: Tangents | None = None

        def run(graph: StepGraph, given: list[Tensor]) -> tuple[Tensor, Sequence[Any]]:
            nonlocal found
            found, rest = graph.tangents(step, given, before, directions)
            return found.evaluation.loss, rest

        moves = [[x is not None for x in direction.metaparameters] for direction in directions]
        along = tuple(map(any, zip(*moves, strict=True)))
        kind = self.kind_of(microbatch, along)
        by_autograd = functools.partial(self.eager.tangents, microbatch, parameters, before, directions)
        if kind is None:
            return by_autograd()
        if not self.trusts(kind) and not self.payoff.pays(kind, parameters[0].device):
            return self.payoff.tangents(kind, by_autograd)
        step = CapturedStep(microbatch, parameters, before)
        if not self.call(kind, step, run):
            return by_autograd()
        assert found is not None
        same = functools.partial(same_tangents, rounds=self.at_once)
        if other := self._as_written(kind, step, found, by_autograd, same):
            return other
        return found

    def _look_at(self, model: torch.nn.Module, loss: Callable[..., Tensor]) -> None:
        """Let go of all graphs if classes that they may use have other methods than when they were captured."""
        methods = methods_of(model, loss)
        if methods != self._methods:
            self._methods = methods
            for known in (self.graphs, self._fronts, self._writes, self._served):
                known.clear()
            self.objectives = CapturedObjectives()

    def trusts(self, kind: Kind) -> bool:
        """Whether steps of this kind run by their graphs: by default, those compared with the loss as it is written."""
        return self.at_once or kind in self._served

    def code_of(self, kind: Kind) -> types.CodeType | None:
        """What Dynamo made for the last call of steps of this kind, where that is known."""
        front = self._fronts.get(kind[:2])
        return None if front is None else front.code

    def call(
        self,
        kind: Kind,
        step: CapturedStep,
        use: Callable[[StepGraph, list[Tensor]], tuple[Tensor, Sequence[Any]]],
    ) -> bool:
        """Call the loss through its graph, which `use` runs. False where there is none. What `use` raises passes, if it
        is an error of this package or no Exception."""
        microbatch, structures = step.microbatch, kind[:2]
        if structures not in self._fronts:
            if len(self._fronts) >= MOST_GRAPHS:
                self.left_out = f"expected batches of at most {MOST_GRAPHS} structures"
                return False
            self._fronts[structures] = Front()
        front, known = self._fronts[structures], len(self.graphs)
        start, used = time.perf_counter(), 0.0

        def run(graph: CapturedGraph, arguments: Sequence[Any]) -> Sequence[Any]:
            nonlocal used
            with microbatch.loss.uncast():
                named = structures, graph.number
                if named not in self._writes:
                    self._writes[named] = step.writes(graph, arguments)
                step.arrange(self._writes[named])
                others, places = step.split(arguments)
                given = [*step.floats, *step.metaparameters, *step.others, *others]
                key = (
                    named,
                    microbatch.share,
                    places,
                    step.moving,
                    kind[-1],
                    tuple([(x.shape, x.stride(), x.dtype) for x in (*step.parameters, *given)]),
                )
                if key not in self.graphs:
                    if len(self.graphs) >= MOST_GRAPHS:
                        raise NotCaptured(f"expected steps of at most {MOST_GRAPHS} shapes")
                    how = self.at_once, self.compile, self.on_device
                    joint, extras = derive(graph, places, step, others, kind[-1], *how)
                    return_freed_memory()  # its comparison takes more than steps will
                    self.graphs[key] = StepGraph(joint, extras, self._writes[named], step.moving, kind[-1])
                step.graph = self.graphs[key]
                if not (self._settled(step.graph) or step.hidden):  # the loss has not ended yet
                    step.hidden = HiddenState(microbatch.loss.binding, microbatch.loss.function)
                step.note(places)
                microbatch.reseed()
                began = time.perf_counter()
                step.loss, rest = use(self.graphs[key], given)
                used = time.perf_counter() - began
                return step.loss, *rest

        try:
            with step.bound():
                front(microbatch.loss.function, microbatch.loss.binding.model, microbatch.batch, step.z, run)
        except MetagradientError:
            raise
        except Exception as error:  # whatever stops a capture does not stop the eager evaluation
            self.payoff.captured += time.perf_counter() - start
            error = getattr(error, "inner_exception", error)  # what Dynamo wraps around ours
            self._give_up(kind, str(error) if isinstance(error, NotCaptured) else reason(error))
            return False
        if len(self.graphs) > known:
            self.payoff.spent(kind, time.perf_counter() - start - used)
        self._served.add(kind)
        return True

    def _give_up(self, kind: Kind, why: str) -> None:
        """Steps of this kind get no graph, unless they had one before; no steps do if none had.

        By default, where autograd has the bits of the graphs, those that had one do without it after some failures.
        """
        self._failures[kind] += 1
        if kind not in self._served or (not self.at_once and self._failures[kind] >= MOST_FAILURES):
            self._failed.add(kind)
        if self._served:  # those go on
            self.left_out = why
        else:
            self.refused = why
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"mgd evaluates steps by autograd that it cannot capture: {why}", RuntimeWarning, stacklevel=2
            )
