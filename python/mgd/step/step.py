"""One training step: its gradient, and its second derivatives in given directions.

A step is a pure function of the step number, parameters, buffers and metaparameters. Its batch, random stream and
microbatches follow from the number alone, so that it can be evaluated again and give the same bits. How one microbatch
is evaluated is up to an `Evaluator`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mgd.errors import ReplayDivergence
from mgd.step.agreement import Agreement, Terms
from mgd.step.batches import microbatches, split_tensors
from mgd.step.evaluator import Direction, Evaluator, Residuals
from mgd.step.loss import BoundLoss, Microbatch
from mgd.step.metaparameters import BatchMetaparameters, Metaparameters
from mgd.step.model import Buffers
from mgd.util.fingerprint import digest
from mgd_kernels import Arena


@dataclass
class StepResult:
    """What the evaluation of a step leaves behind.

    gradient: flat `[n]`, in the dtype in which the model produced it. losses: float64 `[microbatches]` on the CPU, each
    times its share of the batch. buffers: as they were before each microbatch and after the last one.
    norm: of the gradient, once it was computed. residuals: of each microbatch, where all of them kept some.
    """

    gradient: Tensor
    losses: Tensor
    buffers: list[Buffers]
    norm: float | None = None
    residuals: list[Residuals] | None = None


@dataclass
class StateDirection:
    """A direction in what a step reads. params: flat `[n]`. buffers: of the floating-point ones. leaves: of the
    metaparameters, None for those that stay as they are."""

    params: Tensor
    buffers: list[Tensor]
    leaves: list[Tensor | None]


# add(objective, with respect to parameters, of each microbatch the metaparameters and with respect to those)
Add = Callable[[int, Sequence["Tensor | None"], list[tuple[BatchMetaparameters, list["Tensor | None"]]]], None]


class StepFunction:
    """Evaluates the steps of one training.

    moved, unmoved: the parameters, by number, that had a gradient at some step, and those that had none at some step.
    """

    def __init__(self, arena: Arena, loss: BoundLoss, batches: Sequence[Any], microbatches: int, evaluator: Evaluator):
        self.arena, self.loss, self.batches = arena, loss, batches
        self.microbatches, self.evaluator = microbatches, evaluator
        self.moved: set[int] = set()
        self.unmoved: set[int] = set()
        self._agreement = Agreement(arena)
        self._numbers: dict[int, set[str]] = {}  # of each step's batch: digests of its indices and labels

    def gradient(
        self, t: int, params: Tensor, buffers: Buffers, meta: Metaparameters, into: Tensor | None = None
    ) -> StepResult:
        """Evaluate step `t` at the flat `params`. into: memory for the gradient. Errors name the step."""
        total: Tensor | None = None
        losses, history, residuals = [], [buffers], []
        parameters = self.arena.tensors(params)
        moved: set[int] = set()
        for microbatch in self.evaluations(t, meta):
            result = self.evaluator.gradient(microbatch, parameters, history[-1])
            moved.update(i for i, g in enumerate(result.gradients) if g is not None)
            total = self._accumulate(total, result.gradients, into)
            losses.append(result.loss.double())
            history.append(result.buffers)
            if result.residuals is not None:
                residuals.append(result.residuals)
        assert total is not None  # there is at least one microbatch
        self.moved |= moved
        self.unmoved |= set(range(len(parameters))) - moved
        self._agreement.scale = self._agreement.scale or float(total.float().norm())
        values = torch.stack(losses).cpu() if len(losses) > 1 else losses[0].cpu().reshape(1)
        return StepResult(total, values, history, residuals=residuals if len(residuals) == len(losses) else None)

    def tangents(
        self, t: int, params: Tensor, buffers: Buffers, meta: Metaparameters, directions: Sequence[StateDirection]
    ) -> tuple[StepResult, list[Tensor]]:
        """Step `t`, and its gradient's derivative along each direction, flat `[n]`; their buffers become those after
        the step."""
        total: Tensor | None = None
        totals: list[Tensor | None] = [None] * len(directions)
        losses, history = [], [buffers]
        parameters = self.arena.tensors(params)
        moved = [self.arena.tensors(direction.params) for direction in directions]
        for microbatch in self.evaluations(t, meta):
            given = [
                Direction(tensors, direction.buffers, microbatch.metaparameters.along(direction.leaves))
                for tensors, direction in zip(moved, directions, strict=True)
            ]
            found = self.evaluator.tangents(microbatch, parameters, history[-1], given)
            total = self._accumulate(total, found.evaluation.gradients, None)
            for j, direction in enumerate(directions):
                totals[j] = self._accumulate(totals[j], found.gradients[j], None)
                direction.buffers = found.buffers[j]
            losses.append(found.evaluation.loss.double())
            history.append(found.evaluation.buffers)
        assert total is not None
        return StepResult(total, torch.stack(losses).cpu(), history), [x for x in totals if x is not None]

    def second_derivatives(
        self,
        t: int,
        params: Tensor,
        result: StepResult,
        meta: Metaparameters,
        directions: Sequence[Tensor],
        buffer_adjoints: list[list[Tensor]],
        add: Add,
    ) -> list[list[Tensor]]:
        """Derivatives of `<gradient, direction> + <buffers after, adjoint>` for each direction (flat `[n]`).

        `add` receives the terms of every microbatch. Returns the adjoints of the buffers before the step. Raises
        ReplayDivergence where the evaluation is not that of `result`: another loss, or another gradient.
        """
        step = t, params, result, meta, directions, buffer_adjoints
        terms = self._differentiate(self.evaluator, *step)
        discrepancy = self._agreement.discrepancy(result.gradient, directions, terms)
        if discrepancy > self._agreement.tolerance:
            terms = self._judged(discrepancy, terms, *step)
        for objective, derivatives in enumerate(terms.with_parameters):
            add(objective, derivatives, [(slices, each[objective]) for slices, each in terms.with_metaparameters])
        return terms.buffer_adjoints

    def _judged(
        self,
        discrepancy: float,
        terms: Terms,
        t: int,
        params: Tensor,
        result: StepResult,
        meta: Metaparameters,
        directions: Sequence[Tensor],
        buffer_adjoints: list[list[Tensor]],
    ) -> Terms:
        """The terms of a step whose evaluation seems to have another gradient than the one that trained: these, where
        that was rounding, or those of the plain evaluation. Raises ReplayDivergence where that has another, too."""
        fallback, plain = self.evaluator.fallback, terms
        if fallback is not None:
            result.residuals = None
            plain = self._differentiate(fallback, t, params, result, meta, directions, buffer_adjoints)
        self._agreement.confirm(t, result.gradient, directions, plain)
        if plain is not terms and not plain.agree(terms):
            self.evaluator.refuse(f"the gradient that it has at step {t} is not the one that trained")
            return plain
        self._agreement.widen(discrepancy)
        return terms

    def _differentiate(
        self,
        evaluator: Evaluator,
        t: int,
        params: Tensor,
        result: StepResult,
        meta: Metaparameters,
        directions: Sequence[Tensor],
        buffer_adjoints: list[list[Tensor]],
    ) -> Terms:
        """The second derivatives of all microbatches, last one first, without a look at what they belong to."""
        parameters = self.arena.tensors(params)
        tangents = [self.arena.tensors(direction) for direction in directions]
        evaluations = list(self.evaluations(t, meta)) if result.residuals is None else None
        terms = Terms(len(directions), buffer_adjoints)
        for i in reversed(range(self.microbatches)):
            before = result.buffers[i]
            if result.residuals is not None:
                metaparameters = result.residuals[i].metaparameters
                derivatives = result.residuals[i].second_derivatives(t, parameters, tangents, terms.buffer_adjoints)
            else:
                assert evaluations is not None
                metaparameters = evaluations[i].metaparameters
                derivatives = evaluator.second_derivatives(
                    evaluations[i], parameters, before, tangents, terms.buffer_adjoints, result.losses[i]
                )
            terms.append(derivatives, len(parameters), before, metaparameters)
        return terms

    def diverged(self, t: int, i: int, first: float, second: float, meta: Metaparameters) -> Exception:
        """The error of a replayed step whose microbatch `i` has another loss than at first."""
        return list(self.evaluations(t, meta))[i].diverged(first, second)

    def evaluations(self, t: int, meta: Metaparameters) -> Iterator[Microbatch]:
        """The microbatches of step `t`."""
        whole = self.batches[t]
        numbers = [x for x in split_tensors(whole)[0] if not x.is_floating_point() and x.device.type == "cpu"]
        if numbers:
            self._check_numbers(t, numbers)
        for i, (batch, share) in enumerate(microbatches(whole, self.microbatches, t)):
            yield Microbatch(self.loss, self.batches, t, i, batch, share, meta.at(batch, t))
        if any([not x.is_inference() and x._version for x in numbers]):
            self._numbers[t].add(digest(numbers))  # the loss may mask labels in place, to the same end each time

    def _check_numbers(self, t: int, numbers: list[Tensor]) -> None:
        """Raises ReplayDivergence if the batch has other indices or labels than when it was read first: the loss need
        not show it, where weights are equal. On the CPU: to copy them from a GPU would wait for it."""
        found = digest(numbers)
        if found not in self._numbers.setdefault(t, {found}):
            raise ReplayDivergence(
                t,
                f"batches[{t}] has other indices or labels than when it was read before; expected the same ones "
                "(fix the order of the examples and their augmentation).",
            )

    def _accumulate(self, total: Tensor | None, grads: Sequence[Tensor | None], into: Tensor | None) -> Tensor:
        present = [g for g in grads if g is not None]
        if total is None and len(present) == len(grads):
            return self.arena.joined(present, into)
        if total is None:
            total = self.arena.zeros(self.arena.gradient_dtype) if into is None else into.zero_()
        pairs = [(x, g) for x, g in zip(self.arena.slices(total), grads, strict=True) if g is not None]
        torch._foreach_add_([x for x, _ in pairs], [g for _, g in pairs])
        return total
