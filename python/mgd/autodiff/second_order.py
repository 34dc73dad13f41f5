"""First and second derivatives of one evaluation of the loss.

The sweep needs, for a cotangent `u` of the gradient and a cotangent `a` of the buffers that the step leaves behind,
the gradient of `<dL/dθ, u> + <buffers', a>` with respect to parameters, buffers and metaparameters. Two roads:

forward: forward over reverse. `<dL/dθ, u>` is the derivative of L in direction u, so the tangents of one ordinary
    backward pass, with `u` as the tangent of θ, are what is wanted (Pearlmutter 1994). The buffers ride along: with
    ε a dual number of value 0 and tangent 1, the tangent of the gradient of `L + ε <buffers', a>` holds both terms.
reverse: reverse over reverse, through the graph of the gradient. Every operator that has a double backward works, and
    several cotangents share one graph.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mgd.errors import NotDifferentiable

Tensors = Sequence[Tensor]
Gradients = list[list[Tensor | None]]  # one list for each direction, over [*parameters, *buffers, *metaparameters]


@dataclass
class Point:
    """Where the loss is evaluated, and in which directions its second derivatives are wanted.

    constants: every other tensor that the evaluation reads. directions: for each objective, one tensor a parameter.
    cotangents: for each objective, one tensor a buffer.
    """

    parameters: Tensors
    buffers: Tensors
    metaparameters: Tensors
    constants: Tensors
    directions: Sequence[Tensors]
    cotangents: Sequence[Tensors]

    def fixed(self) -> list[Tensors]:
        """The tensors that all directions share, by kind."""
        return [self.parameters, self.buffers, self.metaparameters, self.constants]


# evaluate(parameters, buffers, metaparameters, constants) -> (loss, buffers that the step leaves behind: those that are
# differentiated, then the others)
Evaluate = Callable[[list[Tensor], list[Tensor], list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor]]]
Reseed = Callable[[], None]  # puts the random generators back to the beginning of the evaluation's stream


class StopGradient(TorchFunctionMode):
    """What is computed under torch.no_grad() is a constant for forward mode too, where torch lets tangents through."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        with fwAD._set_fwd_grad_enabled(False):
            return func(*args, **(kwargs or {}))


def leaves(tensors: Tensors) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


@functools.cache
def _load_forward_formulas() -> None:
    """What torch imports with the first dual number, without the deprecation warnings that this import gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch._decomp import decompositions_for_jvp  # noqa: F401


def forward_over_reverse(evaluate: Evaluate, point: Point, reseed: Reseed) -> tuple[Tensor, Gradients]:
    """The loss, and for each direction the tangents of the gradient; one dual evaluation each."""
    _load_forward_formulas()
    results: Gradients = []
    for direction, cotangents in zip(point.directions, point.cotangents, strict=True):
        if results:
            reseed()
        with fwAD.dual_level():
            duals = [fwAD.make_dual(p, t) for p, t in zip(leaves(point.parameters), direction, strict=True)]
            b, z = leaves(point.buffers), leaves(point.metaparameters)
            with StopGradient():
                loss, left = evaluate(duals, [x.clone() for x in b], z, list(point.constants))
            total = loss
            if b:
                one = loss.new_ones(())
                total = loss + fwAD.make_dual(torch.zeros_like(one), one) * _inner(left[: len(b)], cotangents)
            grads = torch.autograd.grad(total, [*duals, *b, *z], allow_unused=True)
            results.append([None if g is None else fwAD.unpack_dual(g).tangent for g in grads])
            loss = fwAD.unpack_dual(loss).primal.detach()
    return loss, results


def reverse_over_reverse(evaluate: Evaluate, point: Point, reseed: Reseed) -> tuple[Tensor, Gradients]:
    """The loss, and for each direction the gradient through the gradient's graph, which is built once."""
    loss, _, _, results = first_and_second(evaluate, point)
    return loss, results


def first_and_second(evaluate: Evaluate, point: Point) -> tuple[Tensor, list[Tensor | None], list[Tensor], Gradients]:
    """The loss, its gradient, the buffers that the step leaves behind, and the second derivatives in each direction.

    Of the buffers, as many as the point has are differentiated; an evaluation may return constant ones after them.
    """
    p, b, z = leaves(point.parameters), leaves(point.buffers), leaves(point.metaparameters)
    inputs = [*p, *b, *z]
    loss, left = evaluate(p, [x.clone() for x in b], z, list(point.constants))
    grads: list[Tensor | None] = list(torch.autograd.grad(loss, p, create_graph=True, allow_unused=True))
    outputs = [*grads, *left[: len(b)]]
    live = {i: output for i, output in enumerate(outputs) if output is not None and output.requires_grad}
    gradient: list[Tensor | None] = [None if g is None else g.detach() for g in grads]
    after = [x.detach() for x in left]
    results: Gradients
    if not live:
        results = [[None] * len(inputs) for _ in point.directions]
        return loss.detach(), gradient, after, results
    cotangents = [
        [[*direction, *cotangent][i] for i in live]
        for direction, cotangent in zip(point.directions, point.cotangents, strict=True)
    ]
    keep = [True] * (len(cotangents) - 1) + [False]
    results = [
        list(torch.autograd.grad(list(live.values()), inputs, cotangent, allow_unused=True, retain_graph=retain))
        for cotangent, retain in zip(cotangents, keep, strict=True)
    ]
    return loss.detach(), gradient, after, results


def _inner(x: Tensors, y: Tensors) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(x, y, strict=True)]).sum()


# The code of what @once_differentiable makes of a backward function.
_ONCE = torch.autograd.function.once_differentiable(lambda ctx: None).__code__


def refuse_once_differentiable(evaluate: Evaluate) -> Evaluate:
    """`evaluate`, with an error where its loss went through an autograd.Function that is only once differentiable.

    torch raises that error in `.backward()`, but silently leaves the terms out of `torch.autograd.grad`.
    """

    def checked(*args):
        loss, left = evaluate(*args)
        seen, stack = set(), [loss.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            function: Any = getattr(node, "_forward_cls", None)
            if getattr(getattr(function, "backward", None), "__code__", None) is _ONCE:
                raise NotImplementedError(f"derivative for {function.__name__} is not implemented: once_differentiable")
            stack += [following for following, _ in node.next_functions]
        return loss, left

    return checked


ROADS = {"forward": forward_over_reverse, "reverse": reverse_over_reverse}
NAMES = {"forward": "forward over reverse", "reverse": "reverse over reverse"}


class SecondDerivative:
    """Chooses the road of the second derivatives, and goes the other way where an operator blocks it.

    mode: "forward", "reverse" or "auto". Both roads cost the same matmuls once dead code is eliminated; "auto" goes in
    reverse, which torch runs with fewer and larger operators (docs/speed.md has the measurements).
    used: the road taken last. fallback: what blocked the road asked for, an operator in most cases, if something did.
    """

    def __init__(self, mode: str):
        self.road = "reverse" if mode == "auto" else mode
        self.fallback: str | None = None
        self._checked = False

    @property
    def used(self) -> str:
        return NAMES[self.road]

    def turn(self, obstacle: str) -> bool:
        """Leave forward mode for reverse because of this obstacle; False where reverse is the road already."""
        if self.road == "reverse":
            return False
        self.fallback, self.road = obstacle, "reverse"
        return True

    def __call__(self, evaluate: Evaluate, point: Point, reseed: Reseed) -> tuple[Tensor, Gradients]:
        """`reseed` puts the random generators back before a second evaluation."""
        # Walking the graph takes time, so the first evaluation of a training stands for all.
        unchecked = self.road == "reverse" and not self._checked
        self._checked |= unchecked
        try:
            return ROADS[self.road](refuse_once_differentiable(evaluate) if unchecked else evaluate, point, reseed)
        except RuntimeError as error:
            op = _blocking_operator(error)
            if op is None:
                raise
            if self.fallback:
                both = op if op == self.fallback else f"{self.fallback}, {op}"
                raise NotDifferentiable(both, str(error).partition("\n")[0]) from error
            self.fallback, self.road = op, "reverse" if self.road == "forward" else "forward"
        reseed()
        return self(evaluate, point, reseed)


# How torch says that an operator has no forward-mode formula, or no derivative of its backward.
_BLOCKED = (
    r"forward AD with (\S+)",
    r"jvp function for (custom autograd\.Function)",
    r"derivative for '?(?:aten::)?(\S+?)'? is not implemented",
)


def _blocking_operator(error: Exception) -> str | None:
    """The operator that torch cannot differentiate, if that is what the error says."""
    found = next(filter(None, (re.search(pattern, str(error)) for pattern in _BLOCKED)), None)
    return found.group(1) if found else None
