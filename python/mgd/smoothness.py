"""Metasmoothness: how far the derivative of a training can be trusted (arXiv 2503.13751, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from mgd.errors import BadArgument

if TYPE_CHECKING:
    from mgd.function import TrainingFunction


def metasmoothness(f: TrainingFunction, z: Mapping[str, Any], direction: Mapping[str, Any], h: float) -> float:
    """The paper's empirical metasmoothness of a training at `z` along `direction`, in [-1, 1].

    With A the map from metaparameters to trained parameters and Δ(z) = (A(z + h v) - A(z)) / h, each trained parameter
    votes on whether Δ keeps its sign from z to z + h v, weighted by how far it moves over both steps:
    S = sign(Δ(z))ᵀ diag(d / |d|₁) sign(Δ(z + h v)), d = |A(z + 2 h v) - A(z)|. Near 1, a metagradient predicts what a
    step of size h does. Costs three trainings.

    direction: tensors for some keys of `z`, of their shapes; the other keys stay. h: > 0, the size of a step.

    Raises BadArgument where the direction does not fit, or no parameter moves.
    """
    if not h > 0:
        raise BadArgument(f"expected h > 0; got {h}")
    unknown = sorted(set(direction) - set(z))
    if unknown or not direction:
        raise BadArgument(f"expected a direction for some of {list(z)}; got {unknown or 'none'}")
    for key in direction:
        shapes = [[x.shape for x in tree_flatten(tree)[0]] for tree in (z[key], direction[key])]
        if shapes[0] != shapes[1]:
            raise BadArgument(
                f"expected direction[{key!r}] of the shape of z[{key!r}]; got {shapes[1]} for {shapes[0]}"
            )

    def trained(steps: int) -> Tensor:
        moved = {key: tree_map(lambda x, v: x + steps * h * v, z[key], direction[key]) for key in direction}
        parameters = f.train({**z, **moved}).parameters.values()
        return torch.cat([p.reshape(-1).double() for p in parameters])

    return agreement(trained(0), trained(1), trained(2))


def agreement(start: Tensor, middle: Tensor, end: Tensor) -> float:
    """The metasmoothness of a training, from the parameters `[n]` that it ends with at z, z + h v and z + 2 h v.

    Raises BadArgument where no parameter moves.
    """
    weight = (end - start).abs()
    total = weight.sum()
    if total == 0:
        raise BadArgument("no trained parameter moves along this direction: give a larger h, or another direction")
    return float((torch.sign(middle - start) * weight * torch.sign(end - middle)).sum() / total)
