"""Tensors copied into large blocks of memory, out of the heap in which a step has its temporaries.

Tensors that are held among temporaries leave malloc free memory in pieces, of which it can use only a part. Slabs leave
it whole. They are small enough for malloc to keep them for the next ones: to map each anew takes longer than to copy
(benchmarks/NOTES.md).
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mgd_kernels.memory import extent

SLAB = 16 << 20  # bytes; glibc maps blocks from 32 MiB on one by one
_LINE = 64  # bytes: tensors keep their places within a cache line, by which kernels choose the order of their sums


class Slab:
    """A block of `size` bytes, of which `used` are taken. It lives as long as a tensor in it."""

    def __init__(self, size: int):
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        self.size, self.used = size, 0
        self.address, self.storage = memory.data_ptr(), memory.untyped_storage()

    @property
    def left(self) -> int:
        return self.size - self.used


class Slabs:
    """Slabs that are filled one after the other. size: bytes of those that have a holder."""

    def __init__(self) -> None:
        self.size = 0
        self._last: Slab | None = None
        self._holders: Counter[Slab] = Counter()

    def hold(self, pieces: Sequence[int], room: int) -> list[tuple[Slab, int]] | None:
        """For each piece, so many bytes, a slab and the place in it. None: this takes more than `room` new bytes.

        The slabs are held until they are released.
        """
        sizes = [] if self._last is None else [self._last.left]
        left, of = list(sizes), dict[int, int]()
        for i in sorted(range(len(pieces)), key=lambda i: -pieces[i]):
            k = next((k for k, rest in enumerate(left) if rest >= pieces[i]), len(left))
            if k == len(left):
                size = max(pieces[i], min(SLAB, room))
                room -= size
                if room < 0:
                    return None
                sizes.append(size)
                left.append(size)
            left[k] -= pieces[i]
            of[i] = k
        old = [] if self._last is None else [self._last]
        slabs = old + [Slab(size) for size in sizes[len(old) :]]
        self.size += sum(sizes[len(old) :])
        places = []
        for i, piece in enumerate(pieces):
            slab = slabs[of[i]]
            places.append((slab, slab.used))
            slab.used += piece
        if slabs:
            self._last = slabs[-1]
        self._holders.update({slab for slab, _ in places})
        return places

    def release(self, places: Iterable[tuple[Slab, int]]) -> None:
        """Let go of what `hold` has returned."""
        for slab in {slab for slab, _ in places}:
            self._holders[slab] -= 1
            if not self._holders[slab]:
                del self._holders[slab]
                self.size -= slab.size
                if slab is self._last:
                    self._last = None


class Layout:
    """Which bytes hold these tensors, each byte once, however many of them share it.

    pieces: bytes of each stretch of memory to copy. apart: tensors that stay where they are, such as a GPU's.
    """

    def __init__(self, values: Iterable[Any]):
        self._values = list(values)
        tensors = {i: x for i, x in enumerate(self._values) if isinstance(x, Tensor)}
        self.apart = [x for x in tensors.values() if not _movable(x)]
        spans = {i: extent(x) for i, x in tensors.items() if _movable(x)}
        self._runs: list[tuple[int, int]] = []  # first and last address
        self._run_of: dict[int, tuple[int, int]] = {}  # of a tensor: its run, and its distance from the beginning
        for i, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
            if self._runs and first < self._runs[-1][1]:  # shares bytes with those before
                self._runs[-1] = (self._runs[-1][0], max(last, self._runs[-1][1]))
            else:
                self._runs.append((first, last))
            self._run_of[i] = (len(self._runs) - 1, first - self._runs[-1][0])
        self.pieces = [_up(first % _LINE + last - first) for first, last in self._runs]

    def copied(self, places: Sequence[tuple[Slab, int]]) -> list[Any]:
        """The values, with copies at these places, of the same strides, in place of what is movable."""
        values, starts = list(self._values), []
        for (first, last), (slab, place) in zip(self._runs, places, strict=True):
            starts.append(place + first % _LINE)
            ctypes.memmove(slab.address + starts[-1], first, last - first)
        for i, (run, distance) in self._run_of.items():
            x, start = values[i], starts[run] + distance
            view = torch.empty(0, dtype=x.dtype, device="cpu")
            values[i] = view.set_(places[run][0].storage, start // x.element_size(), x.shape, x.stride())
        return values


def _movable(x: Tensor) -> bool:
    """Whether its bytes, shape and strides are all there is to it."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and not (x.is_conj() or x.is_neg() or x.is_quantized)
        and x.data_ptr() % x.element_size() == 0
    )


def _up(number: int) -> int:
    return -(-number // _LINE) * _LINE
