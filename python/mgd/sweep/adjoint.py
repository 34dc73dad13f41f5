"""Adjoints of a training state, and where they come from: the objective at the end of the training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mgd.errors import BadObjective, NonFiniteState
from mgd.ranks.shards import Shards
from mgd.results import Trained
from mgd.step.autograd_graph import precision_of
from mgd.step.model import Binding, Buffers, differentiable, modes_kept
from mgd.step.overrides import FunctionOverrides
from mgd.step.random_directions import random_directions, require_equal
from mgd.util.finite import all_finite
from mgd.util.text import describe
from mgd_kernels import OptimizerState


@dataclass
class Adjoint:
    """Cotangents of a training state: of the optimizer's tensors and of the floating-point buffers."""

    state: OptimizerState
    buffers: list[Tensor]

    @classmethod
    def zeros(cls, state: OptimizerState, buffers: Buffers) -> Adjoint:
        return cls(state.zeros_like(), [torch.zeros_like(buffers[name]) for name in differentiable(buffers)])

    def tensors(self) -> Iterator[Tensor]:
        yield from self.state.tensors()
        yield from self.buffers


@dataclass(frozen=True)
class TrainedObjective:
    """An objective at the end of a training.

    steps: T. mode: "eval", or "train" for that of the training. moved: the buffers that the training wrote to. No
    metaparameter leads to the others: they are constants, and their adjoint 0.
    """

    binding: Binding
    objective: Callable[..., Tensor]
    trained: Trained
    steps: int
    mode: str
    moved: Collection[str]

    def value(self) -> Tensor:
        """`[]`, or `[k]` for k objectives, of the bits that `adjoints` gives."""
        with self._evaluated() as (value, _, _):
            return value.detach()

    def adjoints(self, shards: Shards, like: OptimizerState) -> tuple[Tensor, list[Adjoint]]:
        """The value and, for each component, the adjoint of the final state. like: a state of the shapes of its
        adjoint, this process's part."""
        value, gradients, floats = self._gradients()
        adjoints, arena, buffers = [], shards.arena, self.trained.buffers
        for grads in gradients:
            if all(g is None for g in grads):
                raise BadObjective("a component of the objective depends on no trained parameter")
            flat = arena.zeros()
            pairs = [(x, g) for x, g in zip(arena.slices(flat), grads, strict=False) if g is not None]
            if pairs:
                torch._foreach_copy_([x for x, _ in pairs], [g for _, g in pairs])
            del pairs, grads[: len(self.trained.parameters)]  # or they would be held beside the adjoint
            slots = tuple([torch.zeros_like(slot) for slot in like.slots])
            adjoint = replace(like, params=shards.part(flat), slots=slots)
            # Memory of its own: a gradient may be a view with stride 0.
            own = {name: torch.zeros_like(buffers[name]) for name in differentiable(buffers)}
            for name, g in zip(floats, grads, strict=True):
                if g is not None:
                    own[name].copy_(g)
            adjoints.append(Adjoint(adjoint, list(own.values())))
        return value, adjoints

    def gradients(self) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The value and, for each component, its gradient with respect to the trained parameters and the buffers that
        the training moved, by name; without those on which it does not depend."""
        value, gradients, floats = self._gradients()
        names = [*self.trained.parameters, *floats]
        return value, [{n: g for n, g in zip(names, grads, strict=True) if g is not None} for grads in gradients]

    def _gradients(self) -> tuple[Tensor, list[list[Tensor | None]], list[str]]:
        """The value, each component's gradients, and the names of the buffers that are among what they refer to."""
        with self._evaluated() as (value, parameters, floats):
            with torch._C.DisableTorchFunction():  # past the overrides, which would look at each of these questions
                components = value.reshape(-1).unbind()
            inputs, last = [*parameters, *floats.values()], len(components) - 1
            gradients: list[list[Tensor | None]] = [  # the last one lets go of the graph on its way
                list(torch.autograd.grad(component, inputs, retain_graph=i < last, allow_unused=True))
                for i, component in enumerate(components)
            ]
        return value.detach(), gradients, list(floats)

    def tangents(self, shards: Shards, tangents: Sequence[Adjoint]) -> tuple[Tensor, list[Tensor]]:
        """The value, and its derivative along each tangent of the final state. Outputs may be many: they share one
        evaluation. Their derivative is that of the VJP, which is linear in its cotangent."""
        with self._evaluated() as (value, parameters, floats):
            several, inputs = value.numel() > 1, [*parameters, *floats.values()]
            seed = torch.ones_like(value)
            if several:  # another seed for each, so that it shows where the VJP is not linear in it
                seed, epsilon = random_directions([value.detach()])[0].requires_grad_(), _twice_differentiable(value)
            pulled = torch.autograd.grad(value, inputs, seed, create_graph=several, allow_unused=True)
            if all(g is None for g in pulled):
                raise BadObjective("the objective depends on no trained parameter")
            found = []
            for tangent in tangents:
                buffers = dict(zip(differentiable(self.trained.buffers), tangent.buffers, strict=True))
                along = [*shards.arena.tensors(shards.whole(tangent.state.params)), *(buffers[name] for name in floats)]
                terms = [(g * x).sum() for g, x in zip(pulled, along, strict=True) if g is not None]
                whole = torch.stack(terms).sum()
                if not several:
                    found.append(whole.reshape(value.shape).to(value))
                    continue
                (derivative,) = torch.autograd.grad(whole, seed, retain_graph=True, allow_unused=True)
                own = torch.zeros_like(value) if derivative is None else derivative
                parts = [g * x for g, x in zip(pulled, along, strict=True) if g is not None]
                require_equal(whole, (own * seed).sum(), parts, epsilon, "the objective")
                found.append(own.detach())
        return value.detach(), [x.detach() for x in found]

    @contextlib.contextmanager
    def _evaluated(self) -> Iterator[tuple[Tensor, list[Tensor], dict[str, Tensor]]]:
        """The value, and what it was computed from: parameters, and buffers that carry an adjoint."""
        buffers = self.trained.buffers
        with modes_kept(self.binding.model), contextlib.ExitStack() as until:
            parameters = [p.detach().requires_grad_() for p in self.trained.parameters.values()]
            names = [name for name in differentiable(buffers) if name in self.moved]
            floats = {name: buffers[name].detach().requires_grad_() for name in names}
            copies = {name: b.clone() for name, b in (buffers | floats).items()}
            versions = [p._version for p in parameters]
            if self.mode == "eval":
                self.binding.model.eval()
            overrides = FunctionOverrides(formulas=False)
            value = self.binding.call(self.objective, parameters, copies, until=until, overrides=overrides)[0]
            with torch._C.DisableTorchFunction():
                _checked(value, self.steps)
                if [p._version for p in parameters] != versions or overrides.written(parameters):
                    raise BadObjective("the objective changed parameters in place; expected it to only read them")
            yield value, parameters, floats


def _twice_differentiable(value: Tensor) -> float:
    """The machine epsilon of the objective's coarsest arithmetic. Raises BadObjective if it cannot be."""
    try:
        with torch._C.DisableTorchFunction():
            return precision_of(value)
    except NotImplementedError as error:
        raise BadObjective(
            f"forward mode expects an objective of several outputs to be differentiable twice: {error}"
        ) from error


def _checked(value: Any, steps: int) -> Tensor:
    """The objective's value, if it is one."""
    if not isinstance(value, Tensor) or value.ndim > 1 or value.numel() == 0 or not value.is_floating_point():
        raise BadObjective(
            f"expected the objective to be a floating-point tensor of shape [] or [k]; got {describe(value)}"
        )
    if not all_finite(value):
        raise NonFiniteState(steps, "the objective")
    if not value.requires_grad:
        raise BadObjective(
            "the objective does not depend on the trained parameters: compute it from the model it is given, without "
            "torch.no_grad() or .detach()"
        )
    return value


def weighted_sum(adjoints: list[Adjoint], weights: list[float]) -> Adjoint:
    """The adjoint of the weighted sum of the objectives, in the place of the first one's."""
    total = adjoints[0]
    tensors = list(total.tensors())
    torch._foreach_mul_(tensors, weights[0])
    for adjoint, weight in zip(adjoints[1:], weights[1:], strict=True):
        torch._foreach_add_(tensors, list(adjoint.tensors()), alpha=weight)
    return total
