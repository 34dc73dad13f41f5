"""One training step: its gradient, and its second derivatives in given directions.

A step is a pure function of the step number, parameters, buffers and metaparameters. Its batch, random stream and
microbatches follow from the number alone, so that it can be evaluated again and give the same bits. How one microbatch
is evaluated is up to an `Evaluator`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mgd.step.batches import microbatches
from mgd.step.loss import BoundLoss, Microbatch
from mgd.step.metaparameters import BatchMetaparameters, Metaparameters
from mgd.step.model import Buffers, differentiable
from mgd_kernels import Arena

# For each direction, the second derivatives over [*parameters, *floating-point buffers, *metaparameters].
SecondDerivatives = list[list[Tensor | None]]


class Residuals(Protocol):
    """What the evaluation of a microbatch computed for its second derivatives and kept."""

    metaparameters: BatchMetaparameters

    @property
    def bytes(self) -> int: ...

    def second_derivatives(
        self,
        step: int,
        parameters: list[Tensor],
        directions: Sequence[Sequence[Tensor]],
        cotangents: Sequence[Sequence[Tensor]],
    ) -> SecondDerivatives:
        """As `Evaluator.second_derivatives`. Raises ReplayDivergence where an input was changed since."""
        ...


@dataclass(slots=True)
class Evaluation:
    """Loss (detached) and gradients of one microbatch, the buffers it leaves behind, and residuals if it kept any."""

    loss: Tensor
    gradients: Sequence[Tensor | None]
    buffers: Buffers
    residuals: Residuals | None = None


class Evaluator(Protocol):
    """A way to evaluate one microbatch."""

    def gradient(self, microbatch: Microbatch, parameters: list[Tensor], before: Buffers) -> Evaluation:
        """Loss and gradient at `parameters`, with the buffers `before`."""
        ...

    def second_derivatives(
        self,
        microbatch: Microbatch,
        parameters: list[Tensor],
        before: Buffers,
        directions: Sequence[Sequence[Tensor]],
        cotangents: Sequence[Sequence[Tensor]],
        expected: Tensor,
    ) -> SecondDerivatives:
        """Derivatives of `<gradient, direction> + <buffers after, cotangent>`. Raises ReplayDivergence where the loss
        is not `expected` (float64 `[]`, on the CPU), that of the first evaluation."""
        ...

    def describe(self) -> str:
        """How steps were executed, for the report."""
        ...


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


# add(objective, with respect to parameters, metaparameters of the microbatch, with respect to those)
Add = Callable[[int, list["Tensor | None"], BatchMetaparameters, list["Tensor | None"]], None]


class StepFunction:
    """Evaluates the steps of one training."""

    def __init__(self, arena: Arena, loss: BoundLoss, batches: Sequence[Any], microbatches: int, evaluator: Evaluator):
        self.arena, self.loss, self.batches = arena, loss, batches
        self.microbatches, self.evaluator = microbatches, evaluator

    def gradient(
        self, t: int, params: Tensor, buffers: Buffers, meta: Metaparameters, into: Tensor | None = None
    ) -> StepResult:
        """Evaluate step `t` at the flat `params`. into: memory for the gradient. Errors name the step."""
        total: Tensor | None = None
        losses, history, residuals = [], [buffers], []
        parameters = self.arena.tensors(params)
        for microbatch in self._evaluations(t, meta):
            result = self.evaluator.gradient(microbatch, parameters, history[-1])
            total = self._accumulate(total, result.gradients, into)
            losses.append(result.loss.double())
            history.append(result.buffers)
            if result.residuals is not None:
                residuals.append(result.residuals)
        assert total is not None  # there is at least one microbatch
        values = torch.stack(losses).cpu() if len(losses) > 1 else losses[0].cpu().reshape(1)
        return StepResult(total, values, history, residuals=residuals if len(residuals) == len(losses) else None)

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
        ReplayDivergence where the loss is not bit-equal to that of `result`.
        """
        parameters = self.arena.tensors(params)
        tangents = [self.arena.tensors(direction) for direction in directions]
        evaluations = list(self._evaluations(t, meta)) if result.residuals is None else None
        for i in reversed(range(self.microbatches)):
            before = result.buffers[i]
            if result.residuals is not None:
                residuals = result.residuals[i]
                slices = residuals.metaparameters
                derivatives = residuals.second_derivatives(t, parameters, tangents, buffer_adjoints)
            else:
                assert evaluations is not None
                microbatch, slices = evaluations[i], evaluations[i].metaparameters
                derivatives = self.evaluator.second_derivatives(
                    microbatch, parameters, before, tangents, buffer_adjoints, result.losses[i]
                )
            names = differentiable(before)
            p, b = len(parameters), len(parameters) + len(names)
            buffer_adjoints = [
                [torch.zeros_like(before[n]) if a is None else a for n, a in zip(names, each[p:b], strict=True)]
                for each in derivatives
            ]
            for objective, each in enumerate(derivatives):
                add(objective, each[:p], slices, each[b:])
        return buffer_adjoints

    def diverged(self, t: int, i: int, first: float, second: float, meta: Metaparameters) -> Exception:
        """The error of a replayed step whose microbatch `i` has another loss than at first."""
        return list(self._evaluations(t, meta))[i].diverged(first, second)

    def _evaluations(self, t: int, meta: Metaparameters) -> Iterator[Microbatch]:
        for i, (batch, share) in enumerate(microbatches(self.batches[t], self.microbatches, t)):
            yield Microbatch(self.loss, self.batches, t, i, batch, share, meta.at(batch, t))

    def _accumulate(self, total: Tensor | None, grads: Sequence[Tensor | None], into: Tensor | None) -> Tensor:
        present = [g for g in grads if g is not None]
        if total is None and len(present) == len(grads):
            return self.arena.joined(present, into)
        if total is None:
            total = self.arena.zeros(self.arena.gradient_dtype) if into is None else into.zero_()
        pairs = [(x, g) for x, g in zip(self.arena.slices(total), grads, strict=True) if g is not None]
        torch._foreach_add_([x for x, _ in pairs], [g for _, g in pairs])
        return total
