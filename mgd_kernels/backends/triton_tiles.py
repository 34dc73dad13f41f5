"""Which stretch of a flat buffer each program of a Triton kernel handles."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mgd_kernels.arena import Segments


@dataclass(frozen=True)
class Tiles:
    """Which stretch each program handles.

    parts: one launch each, `(tiles, table, size, aligned)`: aligned tiles of up to `size` elements, then the ragged
        ends of segments. A table is int64 `[tiles, 4]` on the device, rows `(start, stop, group, place)`; None where
        the one segment starts at 0 and tiles follow by counting.
    count: of all tiles. They have places in order of group and start, and `ranges`, int64 `[G + 1]`, says where the
        places of each group begin (None where all are of one group).
    """

    parts: tuple[tuple[int, Tensor | None, int, bool], ...]
    count: int
    ranges: Tensor | None


_tiles: WeakKeyDictionary[Segments, dict[tuple[torch.device, int], Tiles]] = WeakKeyDictionary()


def tiles_of(segments: Segments, size: int, device: torch.device) -> Tiles:
    """Cut the segments into tiles of at most `size` elements, none across a boundary; cached with the segments."""
    cached = _tiles.setdefault(segments, {})
    if (device, size) not in cached:
        cached[device, size] = _cut(segments, size, device)
    return cached[device, size]


def _cut(segments: Segments, size: int, device: torch.device) -> Tiles:
    from mgd_kernels.backends.triton_kernels import VECTOR

    vector = VECTOR.value
    rows = segments.rows()
    if len(rows) == 1 and segments.groups == 1 and rows[0][0] == 0 and rows[0][1] % vector == 0:
        count = -(-rows[0][1] // size)
        return Tiles(((count, None, size, True),) if count else (), count, None)
    whole: list[tuple[int, int, int, int]] = []
    ragged: list[tuple[int, int, int, int]] = []
    counts = torch.zeros(segments.groups, dtype=torch.int64, device="cpu")
    for start, stop, group in sorted(rows, key=lambda row: (row[2], row[0])):
        first, last = min(-(-start // vector) * vector, stop), stop // vector * vector
        for begin, end in (
            (start, first),
            *((i, min(i + size, last)) for i in range(first, last, size)),
            (max(first, last), stop),
        ):
            if begin < end:
                place = len(whole) + len(ragged)
                (ragged if begin % vector or end % vector else whole).append((begin, end, group, place))
                counts[group] += 1
    ranges = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(device)
    parts = tuple(
        (len(tiles), torch.tensor(tiles, dtype=torch.int64, device="cpu").to(device), longest, aligned)
        for tiles, longest, aligned in ((whole, size, True), (ragged, vector, False))
        if tiles
    )
    return Tiles(parts, len(whole) + len(ragged), ranges)
