"""Entries that pass through the store without a copy: they are made, and read, in the store's own buffers."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from mgd_kernels.errors import BadArgument
from mgd_kernels.store.format import ALIGNMENT, DTYPE_OF, DTYPES, offsets


class Reservation:
    """A buffer of the store in which an entry is made. `tensor` is the entry's first, for the caller to write."""

    def __init__(self, lease: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._lease = lease
        self._bytes = torch.frombuffer(lease, dtype=torch.uint8)  # holds on to the lease
        self.tensor = _typed(self._bytes, 0, shape, dtype)

    @classmethod
    def of(cls, core: Any, shape: Sequence[int], dtype: torch.dtype, room: int) -> Reservation | None:
        """None where the store has no buffer to spare."""
        if dtype not in DTYPES or room < 0 or any(n < 0 for n in shape):
            raise BadArgument(f"expected a shape, a dtype of the format and room >= 0; got {shape}, {dtype}, {room}")
        lease = core.reserve(prod(shape) * dtype.itemsize + ALIGNMENT + room)
        return None if lease is None else cls(lease, tuple(shape), dtype)

    def commit(self, core: Any, name: bytes, others: list[torch.Tensor]) -> None:
        """Completes the entry with the other tensors and hands it to the store; if that is full, nothing changes."""
        if self._lease is None:
            raise BadArgument("expected a reservation to be committed once; got it again: reserve another one")
        tensors = [self.tensor, *others]
        places = offsets(t.nbytes for t in tensors)
        if places[-1] > len(self._lease):
            raise BadArgument(
                f"expected an entry of at most {len(self._lease)} bytes, as reserved; got {places[-1]}: reserve room"
            )
        for start, other in zip(places[1:], others, strict=False):
            _typed(self._bytes, start, tuple(other.shape), other.dtype).copy_(other)
        core.commit(name, True, [(DTYPES[t.dtype], tuple(t.shape)) for t in tensors], self._lease)
        self._lease = None


def viewed_tensors(core: Any, name: bytes, again: bool) -> list[torch.Tensor] | None:
    """The entry's tensors in the store's own buffer, which stays theirs until the last of them is gone."""
    lease = core.view(name, again)
    if lease is None:
        return None
    layout = [(tuple(shape), DTYPE_OF[code]) for code, shape in core.describe(name)[2]]
    whole = torch.frombuffer(lease, dtype=torch.uint8)
    places = offsets(prod(shape) * dtype.itemsize for shape, dtype in layout)
    return [_typed(whole, start, *each) for start, each in zip(places, layout, strict=False)]


def _typed(whole: torch.Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return whole[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)
