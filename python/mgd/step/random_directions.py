"""Two sums that are equal in exact arithmetic, taken in random directions: a look at what forward mode supposes.

It takes the derivative of a gradient from the gradient's VJP, and that of many outputs from theirs. Both are right for
derivatives of a function, and not for whatever a backward pass gives that somebody wrote, reverses, detaches, or
changes by a hook.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mgd.errors import BadLoss


def random_directions(tensors: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Normal numbers of these shapes, the same each time, that no other stream of random numbers notices."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in tensors]


@torch.no_grad()
def inner(xs: Sequence[Tensor | None], ys: Sequence[Tensor | None], zero: Tensor) -> Tensor:
    """`<xs, ys>`, where None stands for zeros."""
    return sum(((x * y).sum() for x, y in zip(xs, ys, strict=True) if x is not None and y is not None), zero)


def require_equal(x: Tensor, y: Tensor, terms: Sequence[Tensor | None], epsilon: float, what: str) -> None:
    """Raises BadLoss unless x and y are equal up to rounding: inner products of `terms` with random directions, so of
    the size of their norm. epsilon: of the coarsest arithmetic. what: whose backward pass it is."""
    norm = math.sqrt(sum([float(each.detach().double().square().sum()) for each in terms if each is not None]))
    tolerance = min(max(1e-6, 1e4 * epsilon), 0.2)
    if math.isfinite(norm) and abs(float(x.detach()) - float(y.detach())) > tolerance * norm:
        raise BadLoss(
            f"forward mode expects the backward pass of {what} to be its derivative, and differentiable itself; got "
            "another one (a gradient that is reversed, detached or changed by a hook, or a backward pass of your own). "
            "`metagradient` differentiates backward passes as they are written."
        )
