"""The user's loss of one microbatch as a function of tensors, with the random stream of its step."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mgd.errors import BadLoss, NotDifferentiable, ParametersModified, ReplayDivergence
from mgd.step.batches import same, split_tensors
from mgd.step.metaparameters import BatchMetaparameters
from mgd.step.model import Binding, Buffers, differentiable
from mgd.step.overrides import FunctionOverrides
from mgd.step.reads import Reads
from mgd.step.rng import seed_generators, seed_of
from mgd.util.text import describe

# evaluate(parameters, buffers, metaparameters, constants) -> (loss, the buffers that the step leaves behind: those that
# are differentiated, then the others)
Evaluate = Callable[[list[Tensor], list[Tensor], list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor]]]


class BoundLoss:
    """`function(model, batch, z)` on a model whose tensors live elsewhere.

    autocast: the dtype of torch.autocast, or None. seed: of the random streams. steps_before: steps of an earlier
    training whose random streams are used up. plain_since: the first step whose loss differentiated the model itself;
    norms are plain arithmetic, and formulas as written, from there on (see `FunctionOverrides`). precision: the machine
    epsilon of the coarsest dtype of the loss's autograd graph, once that was inspected. written: for every buffer that
    was written to, the step that did so first. reads: what is still to be looked at of its evaluations. compared:
    whether a step may be evaluated again, so that its derivatives with respect to z are taken note of.
    """

    def __init__(
        self,
        binding: Binding,
        function: Callable[..., Tensor],
        device: torch.device,
        *,
        autocast: torch.dtype | None = None,
        seed: int = 0,
        steps_before: int = 0,
    ):
        self.binding, self.function, self.device = binding, function, device
        self.autocast, self.seed, self.steps_before = autocast, seed, steps_before
        self.reads = Reads(device)
        self.compared = True
        self.written: dict[str, int] = {}
        self.plain_since: int | None = None
        self.precision: float | None = None
        self._leaves: tuple[Sequence[Tensor], list[Tensor]] = (), []

    def leaves(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """These tensors as leaves of a new graph, for what does not run it: the same ones, as long as they are views of
        one buffer. What compares the tensors of a call with those of the last one finds nothing new."""
        known = self._leaves[0]
        if len(known) != len(parameters) or not all(map(operator.is_, known, parameters)):
            self._leaves = parameters, [x.detach().requires_grad_() for x in parameters]
        return self._leaves[1]

    def casting(self) -> contextlib.AbstractContextManager:
        """The autocast in which the loss runs, if any."""
        return torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext()

    def uncast(self) -> contextlib.AbstractContextManager:
        """Out of `casting` again, as a backward pass is."""
        return torch.autocast(self.device.type, enabled=False) if self.autocast else contextlib.nullcontext()

    def plain_at(self, step: int) -> bool:
        """Whether formulas are as written, and norms plain arithmetic, at this step."""
        return self.plain_since is not None and step >= self.plain_since

    def moved(self, step: int, buffers: Buffers) -> list[str]:
        """The names of those of which an adjoint may differ from zero at the beginning of this step."""
        return [name for name in differentiable(buffers) if self.written.get(name, step) < step]

    def refuse_writes(
        self, step: int, overrides: FunctionOverrides, parameters: Sequence[Tensor], metaparameters: Sequence[Tensor]
    ) -> None:
        """Raises ParametersModified if an evaluation inside of `overrides` wrote to these tensors past autograd."""
        for what, tensors in (
            ("parameters", parameters),
            ("parameters that do not require a gradient", self.binding.frozen),
            ("metaparameters", metaparameters),
        ):
            if overrides.written(tensors):
                raise ParametersModified(step, what)

    def __call__(
        self,
        microbatch: Microbatch,
        batch: Any,
        parameters: Sequence[Tensor],
        buffers: Buffers,
        metaparameters: Sequence[Tensor],
        until: contextlib.ExitStack,
    ) -> tuple[Tensor, Buffers]:
        """The loss times the microbatch's share, and the buffers as the model leaves them. See `Binding.call`."""
        with self.casting():
            z = microbatch.metaparameters.mapping(list(metaparameters))
            overrides = FunctionOverrides(self.plain_at(microbatch.step))
            try:
                loss, left = self.binding.call(
                    self.function, parameters, buffers, batch, z, until=until, overrides=overrides
                )
            finally:
                if overrides.differentiates and not overrides.plain:
                    self.plain_since = microbatch.step
        self.refuse_writes(microbatch.step, overrides, parameters, metaparameters)
        if moving := [name for name, buffer in left.items() if buffer.is_complex() and buffer.requires_grad]:
            raise NotDifferentiable(
                f"the buffer {moving[0]!r}",
                "it is complex, and the step computes it from what is differentiated. Hold its real and imaginary "
                "part in a buffer (torch.view_as_real), or update it under torch.no_grad().",
            )
        if not isinstance(loss, Tensor) or loss.shape != () or not loss.is_floating_point():
            raise BadLoss(
                f"expected the loss to be a floating-point scalar (shape []); got {describe(loss)} at step "
                f"{microbatch.step}. Reduce it, for instance with .mean()."
            )
        return (loss if microbatch.share == 1.0 else loss * microbatch.share), left


class Microbatch:
    """One evaluation of the loss: which step and slice of its batch, on what, and in which random stream.

    share: of the step's examples; the shares of a step sum to 1. metaparameters: those that the loss sees here.
    """

    __slots__ = ("batch", "batches", "index", "loss", "metaparameters", "share", "step")

    def __init__(
        self,
        loss: BoundLoss,
        batches: Sequence[Any],
        step: int,
        index: int,
        batch: Any,
        share: float,
        metaparameters: BatchMetaparameters,
    ):
        self.loss, self.batches, self.step, self.index = loss, batches, step, index
        self.batch, self.share, self.metaparameters = batch, share, metaparameters

    def reseed(self) -> None:
        """Put torch's generators at the beginning of the microbatch's random stream."""
        loss = self.loss
        seed_generators(seed_of(loss.seed, loss.steps_before + self.step, self.index), loss.device)

    def __call__(
        self,
        parameters: Sequence[Tensor],
        buffers: Buffers,
        metaparameters: Sequence[Tensor],
        until: contextlib.ExitStack,
    ) -> tuple[Tensor, Buffers]:
        """The loss at these tensors, and the buffers as the model leaves them."""
        return self.loss(self, self.batch, parameters, buffers, metaparameters, until)

    def moved(self, buffers: Buffers) -> list[str]:
        """The names of those that carry an adjoint: floating-point ones that an earlier step wrote to.

        The others are constants, in every evaluation of this microbatch: what requires a gradient decides which of its
        kernels torch takes, and whether it takes a tensor at all, as for the weights of some losses.
        """
        return self.loss.moved(self.step, buffers)

    def expect(self, loss: Tensor, first: Tensor, tolerance: float = 0.0) -> None:
        """Raises ReplayDivergence, once both are read, where this evaluation's loss is not that of the first one
        (float64 `[]`), up to a relative tolerance."""

        def look(values: list[float]) -> None:
            if values[0] != values[1] and not math.isclose(*values, rel_tol=tolerance, abs_tol=1e-4 * tolerance):
                raise self.diverged(values[1], values[0])

        self.loss.reads.later(torch.stack([loss.detach().double(), first]), look)

    def of_tensors(self, before: Buffers, until: contextlib.ExitStack) -> TensorLoss:
        """The loss as a function of tensors alone, at the buffers `before`."""
        return TensorLoss(self, before, until)

    def diverged(self, first: float, second: float) -> ReplayDivergence:
        """The error of a loss that is not what it was, with what may be the reason."""
        t = self.step
        if not same(self.batches[t], self.batches[t]):
            return ReplayDivergence(
                t,
                f"batches[{t}] differs each time it is asked for; expected the same tensors "
                "(fix the order of the examples and their augmentation).",
            )
        return ReplayDivergence(
            t,
            f"the loss of microbatch {self.index} was {first!r} at first and {second!r} now. Either batches[{t}] gives "
            "other tensors than before (does the loss change them in place?), or the loss reads something that "
            "changes: random numbers that do not come from torch's generators, state kept outside the model, or a "
            "non-deterministic kernel (see torch.use_deterministic_algorithms).",
        )


class TensorLoss:
    """A microbatch's loss as a function of tensors alone.

    names: of the buffers in the order of the function: first those that can carry an adjoint, `floats` in number, then
    the others. constants: the tensors it reads beside parameters, floating-point buffers and metaparameters. moved:
    which of the first need derivatives.
    """

    def __init__(self, microbatch: Microbatch, before: Buffers, until: contextlib.ExitStack):
        floats = differentiable(before)
        self._others = [name for name in before if name not in floats]
        self._microbatch, self._until, self.floats = microbatch, until, len(floats)
        self.names = [*floats, *self._others]
        moved = microbatch.moved(before)
        self.moved = [name in moved for name in floats]
        tensors, self._rebuild = split_tensors(microbatch.batch)
        self.constants = [before[name] for name in self._others] + tensors

    def __call__(
        self, parameters: list[Tensor], buffers: list[Tensor], metaparameters: list[Tensor], constants: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        values = dict(zip(self.names, buffers, strict=False))
        values |= {name: tensor.clone() for name, tensor in zip(self._others, constants, strict=False)}
        batch = self._rebuild(constants[len(self._others) :])
        loss, left = self._microbatch.loss(self._microbatch, batch, parameters, values, metaparameters, self._until)
        return loss, [left[name] for name in self.names]
