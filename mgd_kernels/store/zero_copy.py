"""Entries that pass through the store without a copy, in a buffer that is handed over."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from mgd_kernels.errors import BadArgument
from mgd_kernels.store.format import ALIGNMENT, DTYPE_OF, DTYPES, offsets


class Lent:
    """A buffer of the store's in which an entry is made. `tensor`: the entry's first, to be written by the borrower."""

    def __init__(self, lease: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._lease = lease
        self._bytes = torch.frombuffer(lease, dtype=torch.uint8)  # keeps the lease
        self.tensor = _view(self._bytes, 0, shape, dtype)

    @classmethod
    def of(cls, core: Any, shape: Sequence[int], dtype: torch.dtype, room: int) -> Lent | None:
        """None where the store has no buffer to lend."""
        if dtype not in DTYPES or room < 0 or any(n < 0 for n in shape):
            raise BadArgument(f"a shape, a dtype of the format and room >= 0 expected; {shape}, {dtype}, {room} came")
        lease = core.lend(prod(shape) * dtype.itemsize + ALIGNMENT + room)
        return None if lease is None else cls(lease, tuple(shape), dtype)

    def put(self, core: Any, name: bytes, others: list[torch.Tensor]) -> None:
        """Completes the entry with the other tensors, and gives it away. A store that is full leaves it lent."""
        if self._lease is None:
            raise BadArgument("a lent buffer is put once, and this one was; lend another one")
        tensors = [self.tensor, *others]
        places = offsets(t.nbytes for t in tensors)
        if places[-1] > len(self._lease):
            raise BadArgument(
                f"a buffer of {len(self._lease)} bytes was lent; the entry needs {places[-1]}: ask for room"
            )
        for start, other in zip(places[1:], others, strict=False):
            _view(self._bytes, start, tuple(other.shape), other.dtype).copy_(other)
        core.put_lent(name, True, [(DTYPES[t.dtype], tuple(t.shape)) for t in tensors], self._lease)
        self._lease = None


def leased_tensors(core: Any, name: bytes, again: bool) -> list[torch.Tensor] | None:
    """The entry's tensors in the store's own buffer, which is leased until the last of them is gone."""
    lease = core.lease(name, again)
    if lease is None:
        return None
    layout = [(tuple(shape), DTYPE_OF[code]) for code, shape in core.describe(name)[2]]
    whole = torch.frombuffer(lease, dtype=torch.uint8)
    places = offsets(prod(shape) * dtype.itemsize for shape, dtype in layout)
    return [_view(whole, start, *each) for start, each in zip(places, layout, strict=False)]


def _view(whole: torch.Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return whole[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)
