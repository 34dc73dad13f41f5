"""Steps evaluated by autograd, as the user's code would be."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks

from mgd.autodiff.execution import LOSS_TOLERANCE, same_bits
from mgd.autodiff.kept_graph import HOOKS, Extent, KeptGraphs, Kind, Rewind, extent_of, kept_graph, kind_of
from mgd.autodiff.second_order import (
    Point,
    SecondOrder,
    blocking_operator,
    first_and_second,
    leaves,
)
from mgd.autodiff.tangents import first_and_tangents
from mgd.errors import BadLoss, MetagradientError, NotDifferentiable, ParametersModified
from mgd.step.agreement import agree
from mgd.step.autograd_graph import precision_of
from mgd.step.batches import split_tensors
from mgd.step.evaluator import Derivatives, Direction, Evaluation, Evaluator, Tangents
from mgd.step.loss import Evaluate, Microbatch, TensorLoss
from mgd.step.model import Buffers, differentiable
from mgd.step.reads import Reads

DETACHED = "the loss of step {} does not depend on the parameters; was it detached?"

Found = TypeVar("Found")
Look = Callable[[Tensor], None]  # is shown a loss with its autograd graph


class EagerEvaluator:
    """Every evaluation by autograd; the others fall back to this one, and are checked against it.

    rounds: the loss that is expected may be that of a graph which rounds differently. kept: whose graphs are
    kept for second derivatives, where there is room.
    """

    fallback: Evaluator | None = None
    capture_seconds = 0.0
    residual_bytes = 0

    def __init__(self, rounds: bool = False):
        self.rounds = rounds
        self.kept = KeptGraphs()
        self._along: Counter[str] = Counter()  # evaluations of forward mode in this training, by their shapes

    def describe(self) -> str:
        return "eager"

    def refuse(self, reason: str) -> None:
        self.kept.refused = True

    def begin(self, reversals: int, room: int) -> None:
        self.kept.begin(reversals)
        self._along.clear()

    def gradient(
        self,
        microbatch: Microbatch,
        parameters: list[Tensor],
        before: Buffers,
        look: Look | None = None,
        *,
        room: int | None = None,
    ) -> Evaluation:
        kind = None if room == 0 or self.kept.refused else kind_of(microbatch)
        held = None if kind is None else self.kept.bytes(kind)
        if kind is None or not self.kept.pays(held):
            return self._evaluate(microbatch, parameters, before, look)
        fits = held is not None and (room is None or held <= room)
        how = {"keep": kind if fits else None, "measure": kind if held is None else None}
        try:
            evaluation = self._evaluate(microbatch, parameters, before, look, **how)
        except RuntimeError as error:
            if isinstance(error, MetagradientError) or (held is not None and HOOKS not in str(error)):
                raise
            self.kept.refused = True  # for instance torch.func, which refuses to be measured
            return self._evaluate(microbatch, parameters, before, look)
        if evaluation.residuals is not None:
            evaluation.residuals.held = max(held or 0, 1)  # 0 is of what stays nowhere
        elif not fits:
            evaluation.not_kept = held or 0
        return evaluation

    def _evaluate(
        self,
        microbatch: Microbatch,
        parameters: list[Tensor],
        before: Buffers,
        look: Look | None,
        **kept: Kind | None,
    ) -> Evaluation:
        known = microbatch.loss.plain_since
        try:
            evaluation = self._gradient(microbatch, parameters, before, look, **kept)
            if microbatch.loss.plain_since == known:
                return evaluation
        except Exception:  # perhaps since the loss asked for a gradient inside of a formula that was replaced
            if microbatch.loss.plain_since == known:
                raise
        # Norms are evaluated in another way from the first step on whose loss differentiates the model.
        return self._gradient(microbatch, parameters, before, look, **kept)

    def _gradient(
        self,
        microbatch: Microbatch,
        parameters: list[Tensor],
        before: Buffers,
        look: Look | None,
        keep: Kind | None = None,
        measure: Kind | None = None,
    ) -> Evaluation:
        """keep: the graph of the gradient, of a microbatch of this kind. measure: what that would take."""
        # Updates write to the parameters between here and the way back, where they are as now: autograd must not count.
        t, inputs = microbatch.step, [p.data.requires_grad_() for p in parameters] if keep else leaves(parameters)
        # Metaparameters need gradients, as where second derivatives are evaluated: that decides which operators run.
        metaparameters = [
            x if x.requires_grad and not keep else x.detach().requires_grad_()
            for x in microbatch.metaparameters.tensors
        ]
        frozen = microbatch.loss.binding.frozen
        given = [*inputs, *frozen, *metaparameters]
        versions = [tensor._version for tensor in given]
        moved = microbatch.moved(before)
        originals = {n: b.detach().requires_grad_() if n in moved else b for n, b in before.items()}
        copies = {n: b.clone() for n, b in originals.items()}
        known = [*inputs, *[originals[name] for name in differentiable(before)], *metaparameters]

        def check_unmodified() -> None:
            """Raises where the loss changed what it was given."""
            if [tensor._version for tensor in given] == versions:
                return
            for k, (tensor, version) in enumerate(zip(given, versions, strict=True)):
                if tensor._version != version:
                    others = "metaparameters"
                    if k < len(inputs) + len(frozen):
                        others = "parameters that do not require a gradient"
                    raise ParametersModified(t, "parameters" if k < len(inputs) else others)

        # What is asked of a tensor while the model is bound goes through Python: the checks come afterwards.
        with contextlib.ExitStack() as stack:
            seen = None
            if measure:
                read = [*given, *before.values(), *split_tensors(microbatch.batch)[0]]
                seen = stack.enter_context(self.kept.measured(measure, read))
            try:
                if keep:
                    stack.enter_context(disable_saved_tensors_hooks(HOOKS))
                microbatch.reseed()
                loss, left = microbatch(inputs, copies, metaparameters, stack)
                if not loss.requires_grad:
                    check_unmodified()
                    raise BadLoss(DETACHED.format(t))
                if look is not None:
                    look(loss)
                stays = keep is not None and self.kept.covers(keep, loss, known)
                one, wanted = torch.ones_like(loss, requires_grad=stays), [*inputs, *metaparameters]
                before_it = Rewind(microbatch.loss) if seen else None
                found = torch.autograd.grad(
                    loss, wanted, one, retain_graph=stays or seen is not None, create_graph=stays, allow_unused=True
                )
                if seen is not None and before_it is not None and not seen.watch.others:
                    before_it.rewind()
                    seen.extent = self._look_at(microbatch, loss, wanted, found, known)
                grads, influence = found[: len(inputs)], found[len(inputs) :]
                if all(g is None for g in grads):
                    check_unmodified()
                    raise BadLoss(DETACHED.format(t))
            except RuntimeError as error:
                check_unmodified()
                if isinstance(error, MetagradientError):
                    raise
                if "leaf Variable" in str(error):
                    what = "parameters or metaparameters" if metaparameters else "parameters"
                    raise ParametersModified(t, what) from error
                if not all(x.requires_grad for x in inputs):
                    raise BadLoss(
                        f"expected the loss to leave requires_grad of the model's parameters as it is; at step {t} it "
                        "switched some off. Freeze them before the training function is made, or train in two of them."
                    ) from error
                if "use_reentrant=True" in str(error):
                    raise BadLoss(
                        f"expected activation checkpoints with use_reentrant=False; step {t} has use_reentrant=True, "
                        "which torch.autograd.grad does not support."
                    ) from error
                raise
        check_unmodified()
        after = _settled(before, copies, left, microbatch.loss.reads)
        evaluation = Evaluation(loss.detach(), grads, after, influence)
        if stays:
            outputs = [*grads, *[left[name] for name in differentiable(before)]]
            evaluation.residuals = kept_graph(self.kept, microbatch, loss, outputs, known, one, after)
            evaluation.gradients = [None if g is None else g.detach() for g in grads]
            evaluation.influence = [None if g is None else g.detach() for g in influence]
        return evaluation

    def _look_at(
        self,
        microbatch: Microbatch,
        loss: Tensor,
        wanted: list[Tensor],
        found: Sequence[Tensor | None],
        known: Sequence[Tensor],
    ) -> Extent | None:
        """The extent of the loss's graph, if the gradient has the same bits where it has a graph, which can be
        differentiated. None where zeros do not tell, as below a last layer of zeros or behind a gate. In `measured`."""
        count = len(wanted) - len(microbatch.metaparameters.tensors)
        try:
            microbatch.loss.precision = precision_of(loss)
            extent = extent_of(loss, known)
            if not extent.foreign:
                one = torch.ones_like(loss, requires_grad=True)
                again = torch.autograd.grad(loss, wanted, one, create_graph=True, allow_unused=True)
                equal = same_bits(again[:count], found[:count]) and agree(again[count:], found[count:])
                self.kept.refused |= not equal
                told = [g is None or bool(g.any()) for g in found[:count]]
                told += [x.numel() != 1 or bool(x.any()) for x in wanted[:count]]
                return extent if all(told) else None
        except (RuntimeError, NotImplementedError):  # second derivatives, if they are wanted, say what is wrong
            pass
        self.kept.refused = True
        return None

    def second_derivatives(
        self,
        microbatch: Microbatch,
        parameters: list[Tensor],
        before: Buffers,
        directions: Sequence[Sequence[Tensor]],
        cotangents: Sequence[Sequence[Tensor]],
        expected: Tensor,
    ) -> Derivatives:
        with contextlib.ExitStack() as stack:
            function = microbatch.of_tensors(before, stack)
            point = point_of(microbatch, function, parameters, before, directions, cotangents)
            return self.at(microbatch, function, point, expected)

    def tangents(
        self,
        microbatch: Microbatch,
        parameters: list[Tensor],
        before: Buffers,
        directions: Sequence[Direction],
        look: Look | None = None,
    ) -> Tangents:
        known = microbatch.loss.plain_since
        with contextlib.ExitStack() as stack:
            function = microbatch.of_tensors(before, stack)
            point = point_of(microbatch, function, parameters, before, [], [])
            microbatch.reseed()
            equal = microbatch.loss.reads.equal
            how = equal, look, self._confirms(microbatch)
            found = self._twice(
                microbatch, function, lambda function: first_and_tangents(function, point, directions, *how)
            )
        if microbatch.loss.plain_since != known:
            return self.tangents(microbatch, parameters, before, directions, look)
        left = dict(zip(function.names, found.buffers, strict=True))
        written = dict(zip(function.names, found.written, strict=False))
        for name in function.names[function.floats :]:
            written[name] = left[name]._version > 0 or not equal(left[name], before[name])
        after = {name: left[name] if written[name] else before[name] for name in before}
        evaluation = Evaluation(found.loss, found.gradient, after)
        return Tangents(evaluation, found.losses, found.gradients, found.floats)

    def _confirms(self, microbatch: Microbatch) -> bool:
        """Whether to do as `tangents.confirm`: at the first step of its shapes, the fourth, the sixteenth and so on."""
        shape = str([x.shape for x in split_tensors(microbatch.batch)[0]])
        self._along[shape] += 1
        times = self._along[shape]
        return not (times & (times - 1) or times.bit_length() % 2 == 0)

    def at(self, microbatch: Microbatch, function: TensorLoss, point: Point, expected: Tensor) -> Derivatives:
        """The second derivatives at a point; the loss there must be `expected`."""
        microbatch.reseed()
        second = self.evaluate(microbatch, function, point)
        microbatch.expect(second.loss, expected, LOSS_TOLERANCE if self.rounds else 0.0)
        precision = microbatch.loss.precision or 0.0
        return Derivatives(second.results, second.products, second.gradient, second.influence, precision)

    def evaluate(self, microbatch: Microbatch, function: TensorLoss, point: Point) -> SecondOrder:
        """As `first_and_second`. Raises NotDifferentiable, naming the operator that has no second derivative."""
        return self._twice(microbatch, function, lambda function: first_and_second(function, point))

    def _twice(self, microbatch: Microbatch, function: TensorLoss, differentiate: Callable[[Evaluate], Found]) -> Found:
        """What `differentiate` computes, by second derivatives of `function`; its graph is looked at the first time."""
        try:
            if microbatch.loss.precision is not None:
                return differentiate(function)

            # Walking the graph takes time, so the first evaluation of a training stands for all.
            def inspected(*tensors: Any) -> tuple[Tensor, list[Tensor]]:
                loss, left = function(*tensors)
                microbatch.loss.precision = precision_of(loss)
                return loss, left

            return differentiate(inspected)
        except RuntimeError as error:
            operator = blocking_operator(error)
            if operator is None:
                raise
            raise NotDifferentiable(operator, str(error).partition("\n")[0]) from error


def point_of(
    microbatch: Microbatch,
    function: TensorLoss,
    parameters: list[Tensor],
    before: Buffers,
    directions: Sequence[Sequence[Tensor]],
    cotangents: Sequence[Sequence[Tensor]],
) -> Point:
    """Where `function` is evaluated, and in which directions."""
    floats = [before[name] for name in function.names[: function.floats]]
    z = microbatch.metaparameters.tensors
    return Point(parameters, floats, z, function.constants, directions, cotangents, function.moved)


def _settled(before: Buffers, copies: Buffers, after: Buffers, reads: Reads) -> Buffers:
    """The buffers after an evaluation on `copies` of those before, sharing memory where nothing changed."""

    def settled(name: str, tensor: Tensor) -> Tensor:
        if tensor is not copies[name]:  # replaced by the model, and perhaps a view of something that will change
            return tensor.detach().clone()
        # What is written through `.data` leaves the version as it was.
        return before[name] if tensor._version == 0 and reads.equal(tensor, before[name]) else tensor.detach()

    return {name: settled(name, tensor) for name, tensor in after.items()}
