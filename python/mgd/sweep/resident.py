"""A training of few small steps, all of which stays in memory: states, gradients, and what their graphs computed.

Where a step takes a millisecond, the actions of a plan and the entries of a log take as long again. Here there are
none: the way down keeps what every step leaves, and the way back reads it. Evaluations, updates and comparisons are
those of any sweep, and so are the bits. A step without a graph, or one that changes the model's buffers, is not for
this sweep, which then lets go of the training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mgd.errors import NonFiniteState
from mgd.plan.budget import Budget
from mgd.plan.training import SHARE, PlanRequest
from mgd.step.agreement import Terms
from mgd.step.combined import changed
from mgd.step.evaluator import Residuals
from mgd.step.hidden_state import HiddenState
from mgd.step.metaparameters import Gradients, Metaparameters
from mgd.step.model import Buffers
from mgd.step.step import StepFunction, StepResult
from mgd.sweep.growth import AdjointGrowth
from mgd.sweep.residuals import FRAGMENTED
from mgd.sweep.sweep import LOST, Sweep
from mgd.util.finite import all_finite
from mgd.util.system import free_memory
from mgd_kernels import OptimizerState

MOST = 256 << 20  # bytes that such a training may take, of which a default budget has
KEPT = "hvp, residuals kept"
UNSEEN = 16 << 20  # bytes for which nobody looks at the free memory, which takes as long as a step


class NotResident(Exception):
    """A step needs more than this sweep has, or more memory. Numbers that the model counts are as they were."""


def room_for(step: StepFunction, meta: Metaparameters, request: PlanRequest) -> int:
    """Bytes that the residuals of all steps may take, with the inputs that they hold, in a training of which
    everything else fits into its memory; 0 where there are too few, as far as the graphs of steps are known."""
    residuals = step.evaluator.residual_bytes
    if not residuals or step.microbatches > 1 or step.shards.ranks.size > 1 or step.arena.device.type != "cpu":
        return 0
    if request.schedule != "auto":
        return 0
    sizes = request.sizes()
    read = sum([leaf.nbytes for leaf in meta.leaves])
    rest = request.steps * (sizes.snapshot + sizes.gradient + read)
    pieces = 1 if request.budget == Budget() else FRAGMENTED  # a budget is kept even so
    total = rest + pieces * request.steps * max(residuals, request.residuals)
    most = most_bytes(request)
    if total <= most:
        most = min(most, UNSEEN if total <= UNSEEN else int(SHARE * free_memory()))
    return (most - rest) // pieces if total <= most else 0


def most_bytes(request: PlanRequest) -> int:
    """Bytes that trainings may take which keep all that their steps leave."""
    limits = request.budget.limits(MOST)
    return min(MOST, limits.get("host", 0) + limits.get("device", 0))


@dataclass(slots=True)
class _Step:
    """What a step leaves. state: parameters and slots before it. influence: the loss's derivatives with respect to what
    it read of z."""

    state: list[Tensor]
    gradient: Tensor
    residuals: Residuals | None
    influence: Sequence[Tensor | None]


class ResidentSweep(Sweep):
    """The training forward and backward. Raises NotResident from the way down alone."""

    def _train_all(self) -> tuple[OptimizerState, Buffers]:
        self._steps: list[_Step] = []
        self._inputs: set[tuple[int, int]] = set()
        step, state, hidden = self.step, self.state, HiddenState(self.step.loss.binding, self.step.loss.function)
        training, update, captured = self.timings.timed("training"), self.timings.timed("update"), self._captured()
        for t in range(self.length):
            room = 0 if t < self.meta.origin else None
            with training:
                (microbatch,) = step.evaluations(t, self.meta)
                parameters = self.arena.tensors(state.params)  # a copy where their dtype is not that of the buffer
                found = step.evaluator.gradient(microbatch, parameters, self.buffers, room=room)
                gradient = self.shards.flat(found.gradients)
            if self._captured() != captured:
                self.timings.move(self._captured() - captured, "training", "capture")
                captured = self._captured()
            if (room is None and not self._has_room(found.residuals)) or changed(self.buffers, [found.buffers]):
                hidden.put_back()
                self.tick("train", -t)  # which another sweep will report
                raise NotResident
            self._note_loss(t, found.loss.item())
            self.updates.skip(t, [i for i, g in enumerate(found.gradients) if g is None])
            step.agreement.note(gradient)
            self._steps.append(_Step([x.clone() for x in state.tensors()], gradient, found.residuals, found.influence))
            with update:
                self.updates.step_(state, gradient, self.meta.tables[t], self.clipping.factor(t, gradient))
        self.timings.counts["model steps"] += self.length
        self.residuals.step_bytes = -(-self.residuals.peak // (self.length - self.meta.origin))
        end = state.clone()
        self._go_to(self.length - 1, self._steps[-1])  # as any sweep does, to the state before the last step
        return end, self.buffers

    def _has_room(self, residuals: Residuals | None) -> bool:
        """Whether a step has residuals, and there is room for them. An input of several steps counts once."""
        if residuals is None:
            return False
        self.residuals.peak += residuals.held
        inputs = {(x.data_ptr(), x.nbytes) for x in residuals.given} - self._inputs
        self._inputs |= inputs
        self.residuals.peak += sum([n for _, n in inputs])
        self.residuals.peak += sum([x.nbytes for x in residuals.tensors if isinstance(x, Tensor)])
        return self.residuals.peak <= self.residuals.room

    def _go_to(self, t: int, step: _Step) -> None:
        for mine, kept in zip(self.state.tensors(), step.state, strict=True):
            mine.copy_(kept)
        self.state.step = t

    def _captured(self) -> float:
        return self.step.evaluator.capture_seconds

    def _note_loss(self, t: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise NonFiniteState(t, "the loss" if all_finite(self.state.params) else LOST)
        self._losses[t, 0] = loss
        self.visited = t + 1
        self.tick("train")

    def _go_back(self, gradients: Gradients, growth: AdjointGrowth) -> None:
        directions = [torch.zeros_like(self.state.params) for _ in self.adjoints]
        vjp, hvp, kept = (self.timings.timed("optimizer vjp"), self.timings.timed("hvp"), self.timings.part(KEPT))
        while len(self._steps) > self.meta.first_step:
            t, last = len(self._steps) - 1, self._steps.pop()
            growth.note(t, self.adjoints)
            self._go_to(t, last)
            with vjp:
                self._through_update(t, last.gradient, directions, gradients)
            if t > self.meta.first_step or self.meta.reads_at(t):
                with hvp, kept:
                    self._through_gradient(t, last, directions, gradients)
                self.timings.counts["hvps"] += len(self.adjoints)
            self.reversed += 1
            self.tick("reverse")

    def _through_gradient(self, t: int, last: _Step, directions: list[Tensor], gradients: Gradients) -> None:
        """The adjoint through the gradient of the step's loss."""
        assert last.residuals is not None
        parameters, tangents = self.arena.tensors(self.state.params), [self.arena.tensors(u) for u in directions]
        cotangents = [a.buffers for a in self.adjoints]
        slices, agreement, add = last.residuals.metaparameters, self.step.agreement, self._adder(t, gradients)
        found = last.residuals.second_derivatives(t, parameters, tangents, cotangents)
        terms = Terms(len(directions))
        if found is not None:
            terms.append(0, found, len(parameters), self.buffers, slices)
        # Where gradients disagree, that is perhaps rounding.
        if found is None or agreement.discrepancy(last.gradient, directions, terms) > agreement.tolerance:
            result = StepResult(last.gradient, self.losses[t], [self.buffers, self.buffers], [last.residuals])
            self.step.note_influence(t, self.meta, last.influence)
            whole = self.state.params, result, self.meta, directions, cotangents
            self.step.second_derivatives(t, *whole, add)
            return
        for j, with_parameters in enumerate(terms.with_parameters):
            add(j, with_parameters, [(slices, each[j]) for slices, each in terms.with_metaparameters])
