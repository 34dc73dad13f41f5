"""First and second derivatives of one evaluation of the loss.

The sweep needs, for a cotangent `u` of the gradient and a cotangent `a` of the buffers that the step leaves behind,
the gradient of `<dL/dθ, u> + <buffers', a>` with respect to parameters, buffers and metaparameters. It is computed in
reverse over reverse, through the graph of the gradient: every operator that has a double backward works, and several
cotangents share one graph. Forward over reverse needs the same matrix products once dead code is eliminated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mgd.step.loss import Evaluate
from mgd.step.step import SecondDerivatives

Tensors = Sequence[Tensor]
Reseed = Callable[[], None]  # puts the random generators back to the beginning of the evaluation's stream


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


def leaves(tensors: Tensors) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def first_and_second(
    evaluate: Evaluate, point: Point
) -> tuple[Tensor, list[Tensor | None], list[Tensor], SecondDerivatives]:
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
    results: SecondDerivatives
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


# How torch says that the backward pass of an operator has no derivative.
_BLOCKED = re.compile(r"derivative for '?(?:aten::)?(\S+?)'? is not implemented")


def blocking_operator(error: Exception) -> str | None:
    """The operator that torch cannot differentiate twice, if that is what the error says."""
    match = _BLOCKED.search(str(error))
    return match.group(1) if match else None
