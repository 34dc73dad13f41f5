"""First and second derivatives of one evaluation of the loss.

The sweep needs, for a cotangent `u` of the gradient and a cotangent `a` of the buffers that the step leaves behind,
the gradient of `<dL/dθ, u> + <buffers', a>` with respect to parameters, buffers and metaparameters. It is computed in
reverse over reverse, through the graph of the gradient: every operator that has a double backward works, and several
cotangents share one graph. Forward over reverse needs the same matrix products once dead code is eliminated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mgd.step.evaluator import SecondDerivatives
from mgd.step.loss import Evaluate

Tensors = Sequence[Tensor]


@dataclass
class Point:
    """Where the loss is evaluated, and in which directions its second derivatives are wanted.

    constants: every other tensor that the evaluation reads. directions: for each objective, one tensor a parameter.
    cotangents: for each objective, one tensor a buffer. moved: for each buffer, whether derivatives with respect to it
    are wanted; all are if it is empty.
    """

    parameters: Tensors
    buffers: Tensors
    metaparameters: Tensors
    constants: Tensors
    directions: Sequence[Tensors]
    cotangents: Sequence[Tensors]
    moved: Sequence[bool] = ()

    def fixed(self) -> list[Tensors]:
        """The tensors that all directions share, by kind."""
        return [self.parameters, self.buffers, self.metaparameters, self.constants]

    def leaves(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Parameters, buffers and metaparameters, as leaves of a new graph."""
        buffers = leaves(self.buffers)
        for buffer, moved in zip(buffers, self.moved, strict=False):
            buffer.requires_grad_(moved)
        return leaves(self.parameters), buffers, leaves(self.metaparameters)


def leaves(tensors: Tensors) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


@dataclass(slots=True)
class SecondOrder:
    """What `first_and_second` computes. loss, gradient, influence, buffers: detached. See `Derivatives` for what they
    are."""

    loss: Tensor
    gradient: list[Tensor | None]
    influence: list[Tensor | None]
    buffers: list[Tensor]
    results: SecondDerivatives
    products: list[Tensor]


def first_and_second(evaluate: Evaluate, point: Point) -> SecondOrder:
    """The loss, its gradient, the buffers that the step leaves behind, and the second derivatives in each direction.

    Of the buffers, as many as the point has are differentiated; an evaluation may return constant ones after them.

    The gradient is seeded with `one`, a tensor that is 1, and is linear in it. So the derivative with respect to `one`
    is `<gradient, direction>` of this very evaluation, at no cost: the sweep compares it with the logged gradient's.
    """
    p, b, z = point.leaves()
    loss, left = evaluate(p, [x.clone() for x in b], z, list(point.constants))
    one = torch.ones_like(loss).requires_grad_()
    inputs = [*p, *b, *z, one]
    first: list[Tensor | None] = list(torch.autograd.grad(loss, [*p, *z], one, create_graph=True, allow_unused=True))
    grads, influence = first[: len(p)], [None if x is None else x.detach() for x in first[len(p) :]]
    del first  # the graph of the metaparameters' derivatives
    live = {i: x for i, x in enumerate([*grads, *left[: len(b)]]) if x is not None and x.requires_grad}
    gradient: list[Tensor | None] = [None if g is None else g.detach() for g in grads]
    after = [x.detach() for x in left]
    results, products = along(live, inputs, point.directions, point.cotangents)
    return SecondOrder(loss.detach(), gradient, influence, after, results, products)


def along(
    live: Mapping[int, Tensor | GradientEdge],
    inputs: Tensors,
    directions: Sequence[Tensors],
    cotangents: Sequence[Tensors],
) -> tuple[SecondDerivatives, list[Tensor]]:
    """For each direction the second derivatives with respect to the inputs but the last one, and the derivative with
    respect to that one, which is what the gradient was seeded with. The graph is let go of.

    live: of the gradient of each parameter and the buffers after the step, in this order, those that have a graph.
    """
    seeds = [[[*d, *c][i] for i in live] for d, c in zip(directions, cotangents, strict=True)]
    results: SecondDerivatives = [[None] * len(inputs) for _ in seeds]
    if live:
        retained = [True] * (len(seeds) - 1) + [False]
        results = [
            gradients(list(live.values()), inputs, seed, retain_graph=retain)
            for seed, retain in zip(seeds, retained, strict=True)
        ]
    zero = torch.zeros_like(inputs[-1]).detach()
    return results, [zero if x is None else x for x in (result.pop() for result in results)]


def gradients(
    outputs: Sequence[Tensor | GradientEdge],
    inputs: Tensors,
    seeds: Tensors | None = None,
    retain_graph: bool | None = None,
    **options: bool,
) -> list[Tensor | None]:
    """`torch.autograd.grad`, with None for inputs that need none."""
    wanted = [x for x in inputs if x.requires_grad]
    several: Any = list(outputs)  # torch is typed for lists of one kind
    found = iter(torch.autograd.grad(several, wanted, seeds, retain_graph, allow_unused=True, **options))
    return [next(found) if x.requires_grad else None for x in inputs]


# How torch says that the backward pass of an operator has no derivative.
_BLOCKED = re.compile(r"derivative for '?(?:aten::)?(\S+?)'? is not implemented")


def blocking_operator(error: Exception) -> str | None:
    """The operator that torch cannot differentiate twice, if that is what the error says."""
    match = _BLOCKED.search(str(error))
    return match.group(1) if match else None
