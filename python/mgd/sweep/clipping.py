"""Clipping of a step's gradient to a global norm, and the derivative of that."""

from __future__ import annotations

import torch
from torch import Tensor

from mgd.ranks.shards import Shards
from mgd.step.reads import Reads

EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_

Number = float | Tensor  # float64 `[]` where nobody waits for it


class Clipping:
    """max_norm: None: gradients stay as they are. The norm of each step is computed once."""

    def __init__(self, max_norm: float | None, shards: Shards, reads: Reads):
        self.max_norm, self._shards, self._reads = max_norm, shards, reads
        self._norms: dict[int, Number] = {}

    def factor(self, t: int, gradient: Tensor) -> Number:
        """By which the gradient of step `t` is multiplied."""
        return self._at(t, gradient)[0]

    def add_derivative_(self, t: int, gradient: Tensor, direction: Tensor, cotangent: Tensor) -> None:
        """Add to the cotangent of the gradient, `direction`, what comes of the factor's. cotangent: of the factor, for
        each parameter group."""
        slope = self._at(t, gradient)[1]
        if isinstance(slope, Tensor):
            direction.add_(gradient.to(direction.dtype) * (slope * cotangent.sum()).to(direction.dtype))
        elif slope:
            direction.add_(gradient, alpha=slope * float(cotangent.sum()))

    def tangents(self, t: int, gradient: Tensor, tangents: list[Tensor]) -> list[Tensor]:
        """Of the clipped gradient, from those of the gradient."""
        factor, slope = self._at(t, gradient)
        if isinstance(slope, Tensor):
            pairs = [(gradient, moved) for moved in tangents]
            along = (slope * self._shards.products(pairs)).unbind()
            return [moved * factor + gradient * x for moved, x in zip(tangents, along, strict=True)]
        if not slope:
            return tangents
        sums = self._shards.dots([(gradient, moved) for moved in tangents])
        return [(moved * factor).add_(gradient, alpha=slope * x) for moved, x in zip(tangents, sums, strict=True)]

    def _at(self, t: int, gradient: Tensor) -> tuple[Number, Number]:
        """The factor, and its derivative's coefficient: d factor/dg = coefficient g."""
        if self.max_norm is None:
            return 1.0, 0.0
        norm, pair = self._norms.get(t), (gradient, gradient)
        if norm is None:
            squares = self._shards.products([pair]) if self._reads.late else self._shards.dots([pair])
            norm = self._norms[t] = squares[0] ** 0.5
        factor = self.max_norm / (norm + EPSILON)
        if isinstance(factor, Tensor):
            clips = (factor < 1.0) & (norm > 0.0)  # of a zero gradient no factor changes anything
            return factor.clamp(max=1.0), torch.where(clips, -factor / (norm + EPSILON) / norm, 0.0)
        if factor >= 1.0:
            return 1.0, 0.0
        return factor, -factor / (norm + EPSILON) / norm if norm else 0.0
