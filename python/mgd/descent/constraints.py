"""Sets in which metaparameters are kept while one descends on them, and the nearest point of each."""

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
        """The nearest point of the set, of the same shape, dtype and device."""
        ...

    def check(self, name: str, x: Tensor) -> None:
        """Raise BadArgument where the set has no point of the shape of `x`."""
        ...


@dataclass(frozen=True)
class Box:
    """`low <= x <= high`, entry by entry; a bound is a number, a tensor that broadcasts, or None for no bound.

    Bounds are taken in the dtype of x: of float32 entries, 0.1 is the float32 next to it.
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
            raise BadArgument(f"no {name!r} is in this box: a lower bound is above its upper bound ({low} > {high})")

    def _bounds(self) -> tuple[Tensor | float | None, Tensor | float | None]:
        return self.low, self.high


@dataclass(frozen=True)
class Simplex:
    """`x >= 0` whose entries, all of them, sum to `total`, up to the rounding of their dtype.

    The projection sorts (Duchi et al. 2008, figure 1).
    """

    total: float = 1.0

    def project(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1).double()
        flat = flat - flat.max()  # moves no projection, and keeps the total from drowning in large entries
        ordered = flat.sort(descending=True).values
        # The largest k whose k largest entries, lowered alike to sum to the total, all stay positive.
        excess = (ordered.cumsum(0) - self.total) / torch.arange(1, len(flat) + 1, device=x.device)
        shift = excess[int((ordered > excess).nonzero().max())]
        return (flat - shift).clamp(min=0).reshape(x.shape).to(x.dtype)

    def check(self, name: str, x: Tensor) -> None:
        if not 0 < self.total < math.inf:
            raise BadArgument(f"no {name!r} is in this simplex: expected a finite total > 0; got {self.total}")
        if x.numel() == 0:
            raise BadArgument(f"no {name!r} is in this simplex: it has no entries")
