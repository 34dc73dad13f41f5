"""Directional derivatives of one evaluation of the loss: how its gradient and its buffers move.

The Hessian is symmetric: the derivative of the gradient along a direction is the gradient of the derivative along it.
With `d` the tangents of parameters, buffers and metaparameters, `<dL/d(all), d>` is the derivative of the loss, and its
gradient with respect to the parameters, one VJP of the gradients with `d` as their cotangents, is the derivative of the
gradient. That of the buffers comes from the derivative of their VJP, which is linear in its cotangent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mgd.autodiff.second_order import Point, gradients
from mgd.errors import BadLoss
from mgd.step.autograd_graph import precision_of
from mgd.step.evaluator import Direction
from mgd.step.loss import Evaluate
from mgd.step.random_directions import inner, random_directions, require_equal


@dataclass
class FirstAndTangents:
    """loss, gradient, buffers: of the evaluation, detached. written: for each floating-point buffer, whether it was
    written to. losses, gradients, floats: for each direction, the
    derivatives of the loss, of the gradient, and of the floating-point buffers."""

    loss: Tensor
    gradient: list[Tensor | None]
    buffers: list[Tensor]
    written: list[bool]
    losses: list[Tensor] = field(default_factory=list)
    gradients: list[list[Tensor | None]] = field(default_factory=list)
    floats: list[list[Tensor]] = field(default_factory=list)


def first_and_tangents(
    evaluate: Evaluate,
    point: Point,
    directions: Sequence[Direction],
    equal: Callable[[Tensor, Tensor], bool] = torch.equal,
    look: Callable[[Tensor], None] | None = None,
    confirming: bool = False,
) -> FirstAndTangents:
    """The loss, its gradient and the buffers that the step leaves, and their derivatives along each direction. equal:
    whether a buffer is as it was. look: is shown the loss with its autograd graph. confirming: do as `confirm` does,
    without another evaluation, which a loss might count."""
    p, b, z = point.leaves()
    copies = [x.clone() for x in b]
    loss, left = evaluate(p, list(copies), z, list(point.constants))
    kept = [x is y and x._version == 0 and equal(x, own) for x, y, own in zip(copies, left, b, strict=False)]
    if not loss.requires_grad:
        raise BadLoss("the loss does not depend on the parameters; was it detached?")
    if look is not None:
        look(loss)
    inputs, after = [*p, *b, *z], left[: len(b)]
    seed = torch.ones_like(loss).requires_grad_() if confirming else None
    first = gradients([loss], inputs, None if seed is None else [seed], create_graph=True)
    moving = [i for i, x in enumerate(after) if x.requires_grad]
    seeds = [torch.zeros_like(after[i]).requires_grad_() for i in moving]
    pulled: Sequence[Tensor | None] = [None] * len(inputs)
    if moving:
        pulled = gradients([after[i] for i in moving], inputs, seeds, create_graph=True)
    gradient: list[Tensor | None] = [None if g is None else g.detach() for g in first[: len(p)]]
    found = FirstAndTangents(loss.detach(), gradient, [x.detach() for x in left], [not k for k in kept])
    for direction in directions:
        tangents = [*direction.parameters, *direction.buffers, *direction.metaparameters]
        found.losses.append(inner(first, tangents, torch.zeros_like(loss)))
        found.gradients.append(_vjp(first, p, tangents))
        moved = dict(zip(moving, _vjp(pulled, seeds, tangents), strict=True))
        found.floats.append([torch.zeros_like(x) if (m := moved.get(i)) is None else m for i, x in enumerate(after)])
    if seed is not None:
        _confirm(loss, after, (p, b, z), first, seed)
    return found


def confirm(evaluate: Evaluate, point: Point) -> None:
    """Raises BadLoss where the step's backward pass is no derivative that can be taken as one here.

    The derivative of the gradient along d, as `first_and_tangents` takes it, has the same inner product with u as d has
    with the VJP of the gradient with u; and gradient and VJPs are linear in what they are seeded with. d, u: random; d
    also moves one metaparameter at a time.
    """
    p, b, z = point.leaves()
    loss, left = evaluate(p, [x.clone() for x in b], z, list(point.constants))
    seed = torch.ones_like(loss).requires_grad_()
    first = gradients([loss], [*p, *b, *z], [seed], create_graph=True)
    _confirm(loss, left[: len(b)], (p, b, z), first, seed)


def _confirm(
    loss: Tensor,
    left: Sequence[Tensor],
    leaves: tuple[list[Tensor], list[Tensor], list[Tensor]],
    first: Sequence[Tensor | None],
    seed: Tensor,
) -> None:
    """See `confirm`. left: the floating-point buffers after the step. first: the gradient, from the seed."""
    p, b, z = leaves
    epsilon, zero = precision_of(loss), torch.zeros_like(loss).detach()
    after = [x for x in left if x.requires_grad]
    seeds = [seed, *[x.requires_grad_() for x in random_directions(after)]]
    inputs, count = [*p, *b, *z], len(p)
    whole, u = random_directions(inputs, 1), random_directions(p, 2)
    back = _vjp(first[:count], inputs, u)
    state = range(count + len(b))
    for moving in (state, *[[i] for i in range(len(state), len(inputs))]):
        d = [x if i in moving else None for i, x in enumerate(whole)]
        *along, product = _vjp(first, [*p, seeds[0]], d)
        mine = [x for i, x in enumerate(back) if i in moving]
        require_equal(inner(along, u, zero), inner(back, d, zero), [*along, *mine], epsilon, "the loss")
        own = [x for i, x in enumerate(first) if i in moving]
        linear = zero if product is None else product
        require_equal(linear, inner(first, d, zero), own, epsilon, "the loss")
    if after:
        pulled = gradients(after, inputs, seeds[1:], create_graph=True)
        moved = _vjp(pulled, seeds[1:], whole)
        require_equal(inner(moved, seeds[1:], zero), inner(pulled, whole, zero), pulled, epsilon, "buffers")


def _vjp(
    outputs: Sequence[Tensor | None], inputs: list[Tensor], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    pairs = zip(outputs, cotangents, strict=True)
    live = [(x, y) for x, y in pairs if x is not None and y is not None and x.requires_grad]
    if not live or not inputs:
        return [None] * len(inputs)
    xs, ys = zip(*live, strict=True)
    return gradients(xs, inputs, ys, retain_graph=True)
