"""One training step: its gradient, and its second derivatives in given directions.

A step is a pure function of the step number, parameters, buffers and metaparameters. Its batch, random stream and
microbatches follow from the number alone, so that it can be evaluated again and give the same bits. How one microbatch
is evaluated is up to an `Evaluator`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mgd.errors import ReplayDivergence
from mgd.ranks.blocks import Blocks
from mgd.ranks.shards import Shards
from mgd.step.agreement import CONFIRMED, Agreement, Terms
from mgd.step.batches import fingerprints, microbatches, split_tensors
from mgd.step.evaluator import Direction, Evaluator, Residuals
from mgd.step.loss import BoundLoss, Microbatch
from mgd.step.metaparameters import BatchMetaparameters, Metaparameters
from mgd.step.model import Buffers
from mgd.util.fingerprint import digest


@dataclass
class StepResult:
    """What the evaluation of a step leaves behind.

    gradient: flat `[n]`, in the dtype in which the model produced it; this process's part, as are all flat buffers
    here. losses: float64 `[microbatches]`, each times its share of the batch. buffers: as they were before each
    microbatch and after the last one. residuals: of each own microbatch, where all of them kept some. not_kept: bytes
    of residuals for which there was no room.
    """

    gradient: Tensor
    losses: Tensor
    buffers: list[Buffers]
    residuals: list[Residuals] | None = None
    not_kept: int = 0


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

    moved, unmoved: the parameters, by number, that had a gradient at some step, and those that had none at some step.
    """

    def __init__(
        self, shards: Shards, loss: BoundLoss, batches: Sequence[Any], microbatches: int, evaluator: Evaluator
    ):
        self.shards, self.arena, self.loss, self.batches = shards, shards.arena, loss, batches
        self.microbatches, self.evaluator = microbatches, evaluator
        self.moved: set[int] = set()
        self.unmoved: set[int] = set()
        self._agreement = Agreement(shards)
        self._numbers: dict[int, set[int]] = {}  # of each step's batch: hashes of its indices and labels

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
        blocks: Blocks[Tensor] = Blocks(Tensor.add_)
        losses, history, residuals, not_kept = [], [buffers], [], 0
        room = None if room is None else room // len(self.shards.own)
        parameters = self.arena.tensors(self.shards.whole(params))
        batch, place = self.batches[t], self.shards.memory(into)
        unmoved: set[int] | None = None
        for microbatch in self._evaluations(t, batch, meta):
            result = self.evaluator.gradient(microbatch, parameters, history[-1], room=room)
            absent = {i for i, g in enumerate(result.gradients) if g is None}
            unmoved = absent if unmoved is None else unmoved & absent
            blocks.add(microbatch.index, self.shards.flat(result.gradients, place))
            place, result.gradients = None, ()  # or they would be held while the next ones are computed
            losses.append(result.loss.double())
            history.append(result.buffers)
            if result.residuals is not None:
                residuals.append(result.residuals)
            not_kept += result.not_kept
        assert unmoved is not None
        if unmoved or len(self.moved) < len(parameters):
            self.moved.update(i for i in range(len(parameters)) if i not in unmoved)
            self.unmoved |= unmoved
        values = self.shards.losses(t, losses, lambda: fingerprints(batch, self.microbatches, t))
        total, histories = self.shards.gradient(blocks, into), self.shards.histories(history)
        self._agreement.note(total)
        kept = residuals if len(residuals) == len(losses) else None
        return StepResult(total, values, histories, kept, not_kept)

    def tangents(
        self, t: int, params: Tensor, buffers: Buffers, meta: Metaparameters, directions: Sequence[StateDirection]
    ) -> tuple[StepResult, list[Tensor]]:
        """Step `t`, and its gradient's derivative along each direction, flat `[n]`; their buffers become those after
        the step."""
        total: Blocks[Tensor] = Blocks(Tensor.add_)
        totals: list[Blocks[Tensor]] = [Blocks(Tensor.add_) for _ in directions]
        losses, history = [], [buffers]
        parameters = self.arena.tensors(self.shards.whole(params))
        moved = [self.arena.tensors(self.shards.whole(direction.params)) for direction in directions]
        batch = self.batches[t]
        for microbatch in self._evaluations(t, batch, meta):
            given = [
                Direction(tensors, direction.buffers, microbatch.metaparameters.along(direction.leaves))
                for tensors, direction in zip(moved, directions, strict=True)
            ]
            found = self.evaluator.tangents(microbatch, parameters, history[-1], given)
            total.add(microbatch.index, self.shards.flat(found.evaluation.gradients))
            for j, direction in enumerate(directions):
                totals[j].add(microbatch.index, self.shards.flat(found.gradients[j]))
                direction.buffers = found.buffers[j]
            losses.append(found.evaluation.loss.double())
            history.append(found.evaluation.buffers)
        values = self.shards.losses(t, losses, lambda: fingerprints(batch, self.microbatches, t))
        histories, gradients = self.shards.histories(history), [self.shards.gradient(x) for x in totals]
        return StepResult(self.shards.gradient(total), values, histories), gradients

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
        agreement, reads = self._agreement, self.loss.reads
        if reads.late and agreement.seen >= CONFIRMED:
            agreement.later(result.gradient, directions, terms, reads)
        elif (discrepancy := agreement.discrepancy(result.gradient, directions, terms)) > agreement.tolerance:
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
        if plain is not terms and not self.shards.ranks.every(plain.agree(terms)):
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
        """The second derivatives of the own microbatches, last one first, without a look at what they belong to."""
        parameters = self.arena.tensors(self.shards.whole(params))
        tangents = [self.arena.tensors(self.shards.whole(direction)) for direction in directions]
        evaluations = list(self.evaluations(t, meta)) if result.residuals is None else None
        terms = Terms(len(directions), buffer_adjoints)
        for k, i in reversed(list(enumerate(self.shards.own))):
            before = result.buffers[i]
            if result.residuals is not None:
                metaparameters = result.residuals[k].metaparameters
                derivatives = result.residuals[k].second_derivatives(t, parameters, tangents, terms.buffer_adjoints)
            else:
                assert evaluations is not None
                metaparameters = evaluations[k].metaparameters
                derivatives = evaluator.second_derivatives(
                    evaluations[k], parameters, before, tangents, terms.buffer_adjoints, result.losses[i]
                )
            terms.append(i, derivatives, len(parameters), before, metaparameters)
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
        tensors = [x for batch, _ in parts for x in split_tensors(batch)[0]]
        numbers = [x for x in tensors if not x.is_floating_point() and x.device.type == "cpu"]
        if numbers:
            self._check_numbers(t, numbers)
        for i, (batch, share) in zip(own, parts, strict=True):
            yield Microbatch(self.loss, self.batches, t, i, batch, share, meta.at(batch, t))
        if any([not x.is_inference() and x._version for x in numbers]):
            self._numbers[t].add(_hash(numbers))  # the loss may mask labels in place, to the same end each time

    def _check_numbers(self, t: int, numbers: list[Tensor]) -> None:
        """Raises ReplayDivergence if the batch has other indices or labels than when it was read first: the loss need
        not show it, where weights are equal. On the CPU: to copy them from a GPU would wait for it."""
        found = _hash(numbers)
        if found not in self._numbers.setdefault(t, {found}):
            raise ReplayDivergence(
                t,
                f"batches[{t}] has other indices or labels than when it was read before; expected the same ones "
                "(fix the order of the examples and their augmentation).",
            )


def _hash(tensors: list[Tensor]) -> int:
    """Of the bits of tensors on the CPU; the same within a process. A fifth of the time of a digest of small ones."""
    try:
        return hash(tuple([(x.dtype, x.shape, x.numpy().tobytes()) for x in tensors]))
    except (RuntimeError, TypeError):  # one that numpy does not have
        return hash(digest(tensors))
