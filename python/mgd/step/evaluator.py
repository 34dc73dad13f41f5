"""A way to evaluate one microbatch: its gradient, and its second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mgd.step.loss import Microbatch
from mgd.step.metaparameters import BatchMetaparameters
from mgd.step.model import Buffers

# For each direction, the second derivatives over [*parameters, *floating-point buffers, *metaparameters].
SecondDerivatives = list[list[Tensor | None]]


@dataclass(slots=True)
class Derivatives:
    """The second derivatives of one microbatch.

    products: for each direction, `<gradient, direction>` (`[]`) with the gradient of this very evaluation. gradient:
    that gradient, where the evaluation has it. influence: the loss's derivatives with respect to the metaparameters, as
    of this evaluation; None where it is the very one that gave the gradient. precision: the machine epsilon of its
    coarsest dtype.
    """

    results: SecondDerivatives
    products: Sequence[Tensor]
    gradient: Sequence[Tensor | None] | None = None
    influence: Sequence[Tensor | None] | None = None
    precision: float = 0.0


class Residuals(Protocol):
    """What the evaluation of a microbatch computed for its second derivatives and kept.

    share: the microbatch's. given: inputs that it holds on to as they are. tensors: what it computed, tensors and
    numbers; copies may take their places, with the same strides, and as far from the beginning of a cache line. held:
    bytes of what it computed besides, which stays where it is.
    """

    metaparameters: BatchMetaparameters
    share: float
    given: list[Tensor]
    tensors: Sequence[Any]
    held: int

    def second_derivatives(
        self,
        step: int,
        parameters: list[Tensor],
        directions: Sequence[Sequence[Tensor]],
        cotangents: Sequence[Sequence[Tensor]],
    ) -> Derivatives | None:
        """As `Evaluator.second_derivatives`; None where the microbatch is to be evaluated again for them. Raises
        ReplayDivergence where an input was changed since, and that would not help."""
        ...


@dataclass(slots=True)
class Evaluation:
    """Loss (detached) and gradients of one microbatch, the buffers it leaves behind, and residuals if it kept any.

    influence: the loss's derivatives with respect to the metaparameters that it sees. not_kept: bytes of residuals for
    which there was no room.
    """

    loss: Tensor
    gradients: Sequence[Tensor | None]
    buffers: Buffers
    influence: Sequence[Tensor | None] = ()
    residuals: Residuals | None = None
    not_kept: int = 0


@dataclass(slots=True)
class Direction:
    """Tangents of what the loss of a microbatch reads: one tensor a parameter and a floating-point buffer, and one a
    metaparameter, or None for one that stays as it is."""

    parameters: Sequence[Tensor]
    buffers: Sequence[Tensor]
    metaparameters: Sequence[Tensor | None]


@dataclass(slots=True)
class Tangents:
    """An evaluation of one microbatch, and for each direction the derivatives along it: of the loss (`[]`), of every
    parameter's gradient, and of every floating-point buffer as the step leaves it."""

    evaluation: Evaluation
    losses: Sequence[Tensor]
    gradients: list[list[Tensor | None]]
    buffers: list[list[Tensor]]


class Evaluator(Protocol):
    """A way to evaluate one microbatch."""

    @property
    def capture_seconds(self) -> float:
        """Spent on graphs of steps so far."""
        ...

    @property
    def residual_bytes(self) -> int:
        """The most that a step so far could keep for its second derivatives; 0: nothing."""
        ...

    def begin(self, reversals: int, room: int) -> None:
        """A training begins, of which so many evaluations will be reversed. room: bytes for all their residuals."""
        ...

    def gradient(
        self, microbatch: Microbatch, parameters: list[Tensor], before: Buffers, *, room: int | None = None
    ) -> Evaluation:
        """Loss and gradient at `parameters`, with the buffers `before`. room: bytes that residuals may take; None: as
        many as there are."""
        ...

    def second_derivatives(
        self,
        microbatch: Microbatch,
        parameters: list[Tensor],
        before: Buffers,
        directions: Sequence[Sequence[Tensor]],
        cotangents: Sequence[Sequence[Tensor]],
        expected: Tensor,
    ) -> Derivatives:
        """Derivatives of `<gradient, direction> + <buffers after, cotangent>`. Raises ReplayDivergence where the loss
        is not `expected` (float64 `[]`), that of the first evaluation, once both are read."""
        ...

    def tangents(
        self, microbatch: Microbatch, parameters: list[Tensor], before: Buffers, directions: Sequence[Direction]
    ) -> Tangents:
        """Loss and gradient, with the derivatives along each direction."""
        ...

    def describe(self) -> str:
        """How steps were executed, for the report."""
        ...

    @property
    def fallback(self) -> Evaluator | None:
        """The plain evaluation of the same steps, where this is a faster one."""
        ...

    def refuse(self, reason: str) -> None:
        """Use the fallback from now on."""
        ...
