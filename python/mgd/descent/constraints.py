"""Sets that metaparameters are projected to during a descent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mgd.errors import BadArgument


class Constraint(Protocol):
    """A closed set of tensors."""

    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the set to `x`, with the shape, dtype and device of `x`."""
        ...

    def check(self, name: str, x: Tensor) -> None:
        """Raise BadArgument if the set has no point of the shape of `x`. name: the variable, for the error."""
        ...


@dataclass(frozen=True)
class Box:
    """`low <= x <= high`, entry by entry. A bound is a number, a tensor that broadcasts to x, or None for no bound.

    Bounds are cast to the dtype of x: for float32 entries, 0.1 is the float32 nearest to it.
    """

    low: Tensor | float | None = None
    high: Tensor | float | None = None

    def project(self, x: Tensor) -> Tensor:
        low, high = (b if b is None else torch.as_tensor(b, dtype=x.dtype, device=x.device) for b in self._bounds())
        return x if low is None and high is None else x.clamp(low, high)

    def check(self, name: str, x: Tensor) -> None:
        low, high = self._bounds()
        for bound in (low, high):
            if isinstance(bound, Tensor):
                try:
                    fits = torch.broadcast_shapes(bound.shape, x.shape) == x.shape
                except RuntimeError:
                    fits = False
                if not fits:
                    raise BadArgument(
                        f"expected bounds of {name!r} that broadcast to {list(x.shape)}; got {list(bound.shape)}"
                    )
            if bound is not None and bool(torch.as_tensor(bound).isnan().any()):
                raise BadArgument(f"expected bounds of {name!r} that are numbers; got {bound}")
        if low is not None and high is not None and bool((torch.as_tensor(low) > torch.as_tensor(high)).any()):
            raise BadArgument(
                f"expected bounds of {name!r} with low <= high; a lower bound is above its upper bound ({low} > {high})"
            )

    def _bounds(self) -> tuple[Tensor | float | None, Tensor | float | None]:
        return self.low, self.high


@dataclass(frozen=True)
class Simplex:
    """`x >= 0`, where all entries of x together sum to `total`, up to the rounding of their dtype.

    The projection sorts the entries (Duchi et al. 2008, figure 1).
    """

    total: float = 1.0

    def project(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1).double()
        # A common shift does not change the projection; without it, rounding of large entries would swamp `total`.
        flat = flat - flat.max()
        ordered = flat.sort(descending=True).values
        # The largest k such that the k largest entries, all lowered equally so as to sum to the total, stay positive.
        excess = (ordered.cumsum(0) - self.total) / torch.arange(1, len(flat) + 1, device=x.device)
        shift = excess[int((ordered > excess).nonzero().max())]
        return (flat - shift).clamp(min=0).reshape(x.shape).to(x.dtype)

    def check(self, name: str, x: Tensor) -> None:
        if not 0 < self.total < math.inf:
            raise BadArgument(f"expected the simplex of {name!r} to have a finite total > 0; got {self.total}")
        if x.numel() == 0:
            raise BadArgument(f"expected at least one entry of {name!r}, to be in a simplex; got shape {list(x.shape)}")
