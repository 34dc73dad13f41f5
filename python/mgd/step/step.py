"""One training step: its gradient, and its second derivatives in given directions.

A step is a pure function of the step number, parameters, buffers and metaparameters. Its batch, random stream and
microbatches follow from the number alone, so that it can be evaluated again and give the same bits. How one microbatch
is evaluated is up to an `Evaluator`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgd.errors import ReplayDivergence
from mgd.ranks.blocks import Blocks
from mgd.ranks.shards import Shards
from mgd.step.agreement import CONFIRMED, ROUNDED, SLIGHT, Agreement, Terms
from mgd.step.batches import BatchNumbers, fingerprints, microbatches, shares
from mgd.step.combined import after_step, after_tangents, changed
from mgd.step.evaluator import Direction, Evaluator, Residuals
from mgd.step.influence import Influence, projections
from mgd.step.loss import BoundLoss, Microbatch
from mgd.step.metaparameters import BatchMetaparameters, Metaparameters
from mgd.step.model import Buffers, differentiable
from mgd.step.reads import LookCloser
from mgd.util.system import return_freed_memory_before


@dataclass
class StepResult:
    """What the evaluation of a step leaves behind.

    gradient: flat `[n]`, in the dtype in which the model produced it; this process's part, as are all flat buffers
    here. losses: float64 `[microbatches]`, each times its share of the batch. buffers: as they were before the step,
    and as it leaves them. residuals: of each own microbatch, where all of them kept some. skipped: the parameters, by
    number, that no microbatch has a gradient of. not_kept: bytes of residuals for which there was no room.
    """

    gradient: Tensor
    losses: Tensor
    buffers: list[Buffers]
    residuals: list[Residuals] | None = None
    skipped: frozenset[int] = frozenset()
    not_kept: int = 0


@dataclass
class _Ended:
    """What all microbatches of a step leave: a row of numbers each, and buffers. changed: whether these are others than
    before. skipped: see `StepResult`."""

    numbers: Tensor
    buffers: Buffers
    skipped: frozenset[int]
    changed: bool

    @property
    def losses(self) -> Tensor:
        return self.numbers[:, 0].contiguous() if self.numbers.shape[1] > 1 else self.numbers.reshape(-1)


@dataclass
class StateDirection:
    """A direction in what a step reads. params: flat `[n]`. buffers: of the floating-point ones. leaves: of the
    metaparameters, None for those that stay as they are."""

    params: Tensor
    buffers: list[Tensor]
    leaves: list[Tensor | None]


# add(objective, with respect to parameters, of each microbatch, last one first, the metaparameters and with respect to
# those)
Add = Callable[[int, Blocks[list["Tensor | None"]], list[tuple[BatchMetaparameters, list["Tensor | None"]]]], None]


class StepFunction:
    """Evaluates the steps of one training: the own microbatches of `shards`, and what all of them add up to.

    influence: how the loss depends on metaparameters, as of each step's first evaluation. agreement: how much the
    gradients of two evaluations may differ.
    """

    def __init__(
        self, shards: Shards, loss: BoundLoss, batches: Sequence[Any], microbatches: int, evaluator: Evaluator
    ):
        self.shards, self.arena, self.loss, self.batches = shards, shards.arena, loss, batches
        self.microbatches, self.evaluator = microbatches, evaluator
        self.influence = Influence(len(batches), microbatches)
        self.agreement = Agreement(shards)
        dtypes = [self.arena.gradient_dtype, loss.autocast or self.arena.gradient_dtype]
        self._machine_epsilon = max(torch.finfo(dtype).eps for dtype in dtypes)
        self._numbers = BatchNumbers()
        self._took = 0.0  # seconds, the last second derivatives of a microbatch

    def gradient(
        self,
        t: int,
        params: Tensor,
        buffers: Buffers,
        meta: Metaparameters,
        into: Tensor | None = None,
        room: int | None = None,
    ) -> StepResult:
        """Evaluate step `t` at the flat `params`. into: memory for the gradient. room: bytes that residuals may take;
        None: as many as there are. Errors name the step."""
        blocks: Blocks[Any] = Blocks(self.shards.sum_)
        rows, left, residuals, influence, not_kept = [], [], [], [], 0
        room = None if room is None else room // len(self.shards.own)
        self.influence.prepare(meta)
        parameters = self.arena.tensors(self.shards.whole(params))
        batch, place = self.batches[t], self.shards.memory(into)
        unmoved: set[int] | None = None
        for microbatch in self._evaluations(t, batch, meta):
            result = self.evaluator.gradient(microbatch, parameters, buffers, room=room)
            absent = {i for i, g in enumerate(result.gradients) if g is None}
            unmoved = absent if unmoved is None else unmoved & absent
            i, gradients = microbatch.index, result.gradients
            blocks.add(i, gradients if blocks.joins(i) else self.shards.flat(gradients, place))
            place, gradients, result.gradients = None, (), ()  # or they would be held while the next are computed
            rows.append(result.loss.double().reshape(1))
            if self.loss.compared and result.influence:
                influence.append(projections(result.influence, result.loss.device))
            result.influence = ()
            left.append(result.buffers)
            if result.residuals is not None:
                residuals.append(result.residuals)
            elif not result.not_kept:
                room = 0  # what is kept is kept of all microbatches, or of none
            not_kept += result.not_kept
        alone = self.shards.ranks.size == 1 and self.arena.device.type == "cpu" and not self.loss.reads.late
        if influence and not alone:
            rows = [torch.cat([row, torch.as_tensor(x).reshape(-1)]) for row, x in zip(rows, influence, strict=True)]
        ended = self._ended(t, batch, buffers, rows, left, unmoved)
        if influence and alone:
            self.influence.compared(t, influence[0] if len(influence) == 1 else np.stack(influence), self._epsilon)
        else:
            self._note_influence(t, ended.numbers[:, 1:])
        total = self.shards.gradient(blocks, into)
        self.agreement.note(total)
        kept = residuals if len(residuals) == len(rows) else None
        return StepResult(total, ended.losses, [buffers, ended.buffers], kept, ended.skipped, not_kept)

    def _ended(
        self, t: int, batch: Any, before: Buffers, rows: list[Tensor], left: list[Buffers], absent: set[int] | None
    ) -> _Ended:
        """What all microbatches of a step have as numbers, and leave. rows, left: those of each own one, and of its
        buffers. absent: parameters, by number, of which no own one has a gradient."""
        prints = functools.partial(fingerprints, batch, self.microbatches, t)
        own = changed(before, left), sorted(absent or ())
        numbers, notes = self.shards.gathered(t, rows, prints, own)
        skipped = frozenset(notes[0][1]).intersection(*[x for _, x in notes]) if notes else frozenset()
        names = list(dict.fromkeys(name for each, _ in notes for name in each))
        if not names:
            return _Ended(numbers, before, skipped, False)
        first = any([name not in self.loss.written for name in names])
        for name in names:
            self.loss.written.setdefault(name, t)
        weights = shares(batch, self.microbatches)
        after = after_step(self.shards, before, left, weights, names, self.loss.reads, first)
        return _Ended(numbers, after, skipped, True)

    def tangents(
        self, t: int, params: Tensor, buffers: Buffers, meta: Metaparameters, directions: Sequence[StateDirection]
    ) -> tuple[StepResult, list[Tensor]]:
        """Step `t`, and its gradient's derivative along each direction, flat `[n]`; their buffers become those after
        the step."""
        total: Blocks[Tensor] = Blocks(Tensor.add_)
        totals: list[Blocks[Tensor]] = [Blocks(Tensor.add_) for _ in directions]
        rows, left = [], []
        unmoved: set[int] | None = None
        moving: list[list[list[Tensor]]] = [[] for _ in directions]  # what each own microbatch leaves of buffers
        parameters = self.arena.tensors(self.shards.whole(params))
        moved = [self.arena.tensors(self.shards.whole(direction.params)) for direction in directions]
        batch = self.batches[t]
        for microbatch in self._evaluations(t, batch, meta):
            given = [
                Direction(tensors, direction.buffers, microbatch.metaparameters.along(direction.leaves))
                for tensors, direction in zip(moved, directions, strict=True)
            ]
            found = self.evaluator.tangents(microbatch, parameters, buffers, given)
            total.add(microbatch.index, self.shards.flat(found.evaluation.gradients))
            for j in range(len(directions)):
                totals[j].add(microbatch.index, self.shards.flat(found.gradients[j]))
                moving[j].append(found.buffers[j])
            absent = {i for i, g in enumerate(found.evaluation.gradients) if g is None}
            unmoved = absent if unmoved is None else unmoved & absent
            rows.append(found.evaluation.loss.double().reshape(1))
            left.append(found.evaluation.buffers)
        ended = self._ended(t, batch, buffers, rows, left, unmoved)
        if ended.changed:
            for direction, each in zip(directions, moving, strict=True):
                direction.buffers = after_tangents(self.shards, each, shares(batch, self.microbatches))
        gradients, histories = [self.shards.gradient(x) for x in totals], [buffers, ended.buffers]
        total_gradient = self.shards.gradient(total)
        return StepResult(total_gradient, ended.losses, histories, None, ended.skipped), gradients

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
        agreement, reads = self.agreement, self.loss.reads
        if reads.late and agreement.seen >= CONFIRMED:
            agreement.later(result.gradient, directions, terms, reads)
            self._look_at_influence(t, terms)
        else:
            discrepancy = agreement.discrepancy(result.gradient, directions, terms)
            if discrepancy > agreement.tolerance or self._other_influence(t, terms) is not None:
                terms = self._judged(discrepancy, terms, *step)
        for objective, derivatives in enumerate(terms.with_parameters):
            add(objective, derivatives, [(slices, each[objective]) for slices, each in terms.with_metaparameters])
        return self._before(t, result.buffers[0], terms)

    def _before(self, t: int, before: Buffers, terms: Terms) -> list[list[Tensor]]:
        """For each direction the adjoints of the buffers before a step, from those of the own microbatches."""
        names, moved = differentiable(before), self.loss.moved(t, before)
        if not moved:
            return [[torch.zeros_like(before[name]) for name in names] for _ in terms.with_parameters]
        places = [i for i, name in enumerate(names) if name in moved]

        def whole(i: int, adjoint: Tensor | None) -> Tensor:
            return torch.zeros_like(before[names[i]]) if adjoint is None else adjoint

        own = [[whole(i, each[i]) for each in rows for i in places] for rows in terms.with_buffers]
        sums = iter([functools.reduce(torch.add, each) for each in zip(*self.shards.of_all(own), strict=True)])
        return [
            [next(sums) if name in moved else torch.zeros_like(before[name]) for name in names]
            for _ in terms.with_parameters
        ]

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
        if self._repeats(discrepancy, terms, t, params, result, meta):
            self.agreement.widen(discrepancy)
            return terms
        fallback, plain = self.evaluator.fallback, terms
        # What autograd kept may hold inputs that were changed since. Other ranks need not have kept it as well.
        kept = not self.shards.ranks.every(not any([x.held for x in result.residuals or ()]))
        if kept:
            fallback = fallback or self.evaluator
        if fallback is not None:
            result.residuals = None
            plain = self._differentiate(fallback, t, params, result, meta, directions, buffer_adjoints)
        self.agreement.confirm(t, result.gradient, directions, plain)
        if key := self._other_influence(t, plain):
            raise self.influence.diverged(t, key)
        own = self.agreement.discrepancy(result.gradient, directions, plain) if plain is not terms else discrepancy
        rounding = own > self.agreement.tolerance or discrepancy <= ROUNDED * self._machine_epsilon
        if plain is not terms and not self.shards.ranks.every(rounding and plain.agree(terms)):
            self.evaluator.refuse(f"the gradient that it has at step {t} is not the one that trained")
            return plain
        self.agreement.widen(own if kept else discrepancy)
        return plain if kept else terms

    def _repeats(
        self, discrepancy: float, terms: Terms, t: int, params: Tensor, result: StepResult, meta: Metaparameters
    ) -> bool:
        """Whether a slight discrepancy is rounding: graphs evaluated all of it, and have to the bit the gradient
        that trained. A fifth of the time of the plain evaluation, and less memory."""
        graphs = result.residuals is None and terms.gradient is None
        slight = discrepancy <= SLIGHT * self.agreement.tolerance and self._other_influence(t, terms) is None
        if not self.shards.ranks.every(graphs and slight):
            return False
        return_freed_memory_before(self._took)
        again = self.gradient(t, params, result.buffers[0], meta, room=0)
        return self.shards.ranks.every(torch.equal(again.gradient, result.gradient))

    # --- how the loss depends on metaparameters ----------------------------------------------------------------

    def note_influence(self, t: int, meta: Metaparameters, derivatives: Sequence[Tensor | None]) -> None:
        """Take note of dL/dz at the first evaluation of step `t`, if it may be evaluated again after all."""
        self.influence.prepare(meta)
        if derivatives:
            self.influence.compared(t, projections(derivatives, self.arena.device), self._epsilon)

    def _note_influence(self, t: int, numbers: Tensor) -> None:
        """Compare what step `t` has with what it had at first, once it is read. numbers: a row for each microbatch."""
        if numbers.numel():
            self.loss.reads.later(numbers, lambda values: self.influence.compared(t, values, self._epsilon))

    def _look_at_influence(self, t: int, terms: Terms) -> None:
        """Raises LookCloser, once the numbers are read, where an evaluation of step `t` differs from its first one."""
        own = list(terms.influence)

        def look(values: list[float]) -> None:
            if self.influence.differing(t, own, values, self._epsilon):
                raise LookCloser

        if own:
            self.loss.reads.later(torch.stack([torch.as_tensor(x) for x in terms.influence.values()]), look)

    def _other_influence(self, t: int, terms: Terms) -> str | None:
        """The key of a metaparameter on which the loss of step `t` depends otherwise than at first."""
        if not terms.influence:
            return None
        values = np.stack([x if isinstance(x, np.ndarray) else x.cpu().numpy() for x in terms.influence.values()])
        return self.influence.differing(t, list(terms.influence), values, max(self._epsilon, terms.precision))

    @property
    def _epsilon(self) -> float:
        """Of the coarsest arithmetic that is known of."""
        return max(self.loss.precision or 0.0, self._machine_epsilon)

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
        """The second derivatives of the own microbatches, last one first, without a look at what they belong to."""
        parameters = self.arena.tensors(self.shards.whole(params))
        tangents = [self.arena.tensors(self.shards.whole(direction)) for direction in directions]
        evaluations = list(self.evaluations(t, meta)) if result.residuals is None else None
        terms, before = Terms(len(directions)), result.buffers[0]
        written = set(self.loss.moved(t + 1, before))
        moved = [name in written for name in differentiable(before)]
        own: Sequence[Microbatch | Residuals] = evaluations or result.residuals or ()
        for k, i in reversed(list(enumerate(self.shards.own))):
            one, cotangents = own[k], buffer_adjoints
            return_freed_memory_before(self._took)
            start = time.perf_counter()
            if any(moved) and self.microbatches > 1:  # each has its share in the mean
                cotangents = [
                    [a * one.share if moves else a for a, moves in zip(adjoints, moved, strict=True)]
                    for adjoints in buffer_adjoints
                ]
            if isinstance(one, Microbatch):
                derivatives = evaluator.second_derivatives(
                    one, parameters, before, tangents, cotangents, result.losses[i]
                )
            else:
                kept = one.second_derivatives(t, parameters, tangents, cotangents)
                if kept is None:
                    (one,) = self.evaluations(t, meta, range(i, i + 1))
                    kept = evaluator.second_derivatives(one, parameters, before, tangents, cotangents, result.losses[i])
                derivatives = kept
            terms.append(i, derivatives, len(parameters), before, one.metaparameters)
            self._took = time.perf_counter() - start
        return terms

    def diverged(self, t: int, i: int, first: float, second: float, meta: Metaparameters) -> Exception:
        """The error of a replayed step whose microbatch `i` has another loss than at first."""
        own = [microbatch for microbatch in self.evaluations(t, meta) if microbatch.index == i]
        return own[0].diverged(first, second) if own else ReplayDivergence(t, f"microbatch {i} has another loss now")

    def evaluations(self, t: int, meta: Metaparameters, own: range | None = None) -> Iterator[Microbatch]:
        """These microbatches of step `t`; by default the own ones."""
        return self._evaluations(t, self.batches[t], meta, own)

    def _evaluations(self, t: int, whole: Any, meta: Metaparameters, own: range | None = None) -> Iterator[Microbatch]:
        own = self.shards.own if own is None else own
        parts = microbatches(whole, self.microbatches, t, own)
        numbers = self._numbers.check(t, own, [batch for batch, _ in parts])
        for i, (batch, share) in zip(own, parts, strict=True):
            yield Microbatch(self.loss, self.batches, t, i, batch, share, meta.at(batch, t))
        self._numbers.note(t, numbers)
