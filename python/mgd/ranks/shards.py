"""Which part of a training's flat buffers, and of its microbatches, a process has.

A flat buffer is cut into as many pieces as there are microbatches; a rank owns the same share of both. Numbers that
are sums over a whole buffer are sums over its pieces, in order, and sums over microbatches are taken by `Blocks`: so
the bits of a training depend on the number of its microbatches, not on the number of its ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mgd.errors import BadArgument, RanksDisagree
from mgd.ranks.blocks import Blocks, places
from mgd.ranks.ranks import Ranks
from mgd_kernels import Arena, Optimizer, OptimizerState
from mgd_kernels.arena import ALIGNMENT, Stretch
from mgd_kernels.dispatch import dot, dot_number
from mgd_kernels.memory import as_bytes

Tensors = Sequence["Tensor | None"]


def shards_of(ranks: Ranks, arena: Arena, microbatches: int, elementwise: bool) -> Shards:
    """elementwise: the optimizer lets a buffer be cut anywhere, not only between parameters."""
    return (Shards if ranks.size == 1 else RankShards)(ranks, arena, microbatches, elementwise)


class Shards:
    """The whole of everything, which is what one process has.

    own: this process's microbatches. pieces: those of its range of a flat buffer, within that range, as
    `(start, stop, the arena of its parameters or None)`. layout: what its flat buffers are.
    """

    def __init__(self, ranks: Ranks, arena: Arena, microbatches: int, elementwise: bool):
        self.ranks, self.arena, self.microbatches = ranks, arena, microbatches
        each = microbatches // ranks.size
        self.own = range(ranks.rank * each, (ranks.rank + 1) * each)
        bounds = [0, arena.numel] if microbatches == 1 else _bounds(arena, microbatches, elementwise)
        self._bounds, self.ranges = bounds, _ranges(bounds, ranks.size)
        self.start, stop = self.ranges[ranks.rank]
        parts = [None if elementwise else _part(arena, a, b) for a, b in pairwise(bounds)]
        self.pieces = [
            (a - self.start, b - self.start, part)
            for (a, b), part in list(zip(pairwise(bounds), parts, strict=True))[self.own.start : self.own.stop]
        ]
        self._part = None if elementwise else _part(arena, self.start, stop)
        self.layout: Arena | Stretch = arena

    def ranges_of(self, size: int) -> list[tuple[int, int]]:
        """The ranges that the ranks have where there are `size` of them."""
        if self.microbatches % size:
            raise BadArgument(f"expected as many ranks as divide {self.microbatches} microbatches; got {size}")
        return _ranges(self._bounds, size)

    def longest(self, size: int) -> Arena | Stretch:
        """What the flat buffers of the longest range are, where there are `size` ranks."""
        if size == 1:
            return self.arena
        numel = max(stop - start for start, stop in self.ranges_of(size))
        return Stretch(numel, self.arena.dtype, self.arena.gradient_dtype, self.arena.device)

    # --- flat buffers ------------------------------------------------------------------------------------------

    def state(self, state: OptimizerState) -> OptimizerState:
        """This process's part of a training state."""
        return state

    def part(self, flat: Tensor) -> Tensor:
        """This process's part of a flat buffer."""
        return flat

    def whole(self, part: Tensor) -> Tensor:
        """The flat buffer of which every process has its part."""
        return part

    def share(self) -> dict[str, tuple[int, int]]:
        """The elements `start` to `stop`, of the flat parameter, that are in this process's range, by its name."""
        begin, end = self.ranges[self.ranks.rank]
        places = zip(self.arena.names, self.arena.offsets, self.arena.shapes, strict=True)
        bounds = {n: (max(begin - at, 0), min(end - at, shape.numel())) for n, at, shape in places}
        return {name: (start, stop) for name, (start, stop) in bounds.items() if start < stop}

    def shares(self, part: Tensor) -> dict[str, Tensor]:
        """Those elements of this process's part of a flat buffer, in the parameters' dtypes."""
        offsets = dict(zip(self.arena.names, self.arena.offsets, strict=True))
        dtypes = dict(zip(self.arena.names, self.arena.dtypes, strict=True))
        return {
            name: part[offsets[name] + start - self.start : offsets[name] + stop - self.start].to(dtypes[name])
            for name, (start, stop) in self.share().items()
        }

    def memory(self, into: Tensor | None) -> Tensor | None:
        """Where the first of a step's gradients goes, whose sum belongs into this buffer."""
        return into

    # --- sums over microbatches --------------------------------------------------------------------------------

    def flat(self, tensors: Tensors, into: Tensor | None = None) -> Tensor:
        """One tensor per parameter as a flat buffer in the dtype of gradients; None stands for zeros."""
        present = [x for x in tensors if x is not None]
        if len(present) == len(tensors):
            return self.arena.joined(present, into)
        flat = self.arena.zeros(self.arena.gradient_dtype) if into is None else into.zero_()
        self._copy(flat, tensors)
        return flat

    def _copy(self, flat: Tensor, tensors: Tensors) -> None:
        pairs = [(x, g) for x, g in zip(self.arena.slices(flat), tensors, strict=True) if g is not None]
        if pairs:
            torch._foreach_copy_([x for x, _ in pairs], [g for _, g in pairs])

    def sum_(self, flat: Tensor, more: Tensor | Tensors) -> Tensor:
        """Add another flat buffer, or one tensor per parameter, to a flat buffer: to the same bits."""
        if isinstance(more, Tensor):
            return flat.add_(more)
        pairs = list(zip(self.arena.slices(flat), more, strict=True))
        if present := [(x, g.detach()) for x, g in pairs if g is not None]:
            torch._foreach_add_([x for x, _ in present], [g for _, g in present])
        for x in [x for x, g in pairs if g is None]:
            x.add_(0.0)  # which makes 0 of -0, as the sum with zeros does
        return flat

    def gradient(self, blocks: Blocks[Tensor], into: Tensor | None = None) -> Tensor:
        """This process's part of the sum of flat gradients, in `into` where it is given."""
        total = blocks.total()
        return total if into is None or total is into else into.copy_(total)

    def add_(self, part: Tensor, blocks: Blocks[list[Tensor | None]]) -> None:
        """Add the sum of terms, one tensor per parameter, to this process's part of a flat buffer."""
        terms = blocks.total()
        pairs = [
            (x, g if g.dtype == x.dtype else g.to(x.dtype))
            for x, g in zip(self.arena.slices(part), terms, strict=True)
            if g is not None
        ]
        if pairs:
            torch._foreach_add_([x for x, _ in pairs], [g for _, g in pairs])

    def gathered(
        self, step: int, rows: Sequence[Tensor], parts: Callable[[], Sequence[int]], note: tuple[Any, ...]
    ) -> tuple[Tensor, list[Any]]:
        """A row of numbers of each microbatch, float64 `[microbatches, n]`, from those of the own ones, and every
        process's note; none where all are of empty things. parts: a fingerprint of each microbatch, as far as this
        process has them."""
        return torch.stack(list(rows)) if len(rows) > 1 else rows[0].unsqueeze(0), [note] if any(note) else []

    def of_all(self, own: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
        """Tensors of each microbatch, of the same shapes and dtypes, from those of the own ones."""
        return own

    # --- sums over flat buffers --------------------------------------------------------------------------------

    def totals(self, rows: Tensor) -> Tensor:
        """Sum numbers `[own pieces or microbatches, ...]` over those of all processes, in order."""
        first, *others = self.ranks.numbers(rows).unbind()
        for each in others:
            first = first + each
        return first

    def dots(self, pairs: Sequence[tuple[Tensor, Tensor]], beside: Sequence[Sequence[float]] = ()) -> list[float]:
        """The inner products of flat buffers. beside: for each own microbatch further numbers, whose sums come last."""
        if self.microbatches == 1:
            return [_number(x, y) for x, y in pairs] + list(beside[0] if beside else ())
        rows = []
        for i, (start, stop, _) in enumerate(self.pieces):
            row = [_number(x[start:stop], y[start:stop]) if stop > start else 0.0 for x, y in pairs]
            rows.append([*row, *(beside[i] if beside else ())])
        return self.totals(torch.tensor(rows, dtype=torch.float64, device="cpu")).tolist()

    def products(self, pairs: Sequence[tuple[Tensor, Tensor]], beside: Sequence[Sequence[Tensor]] = ()) -> Tensor:
        """As `dots`, of one process, float64 where the tensors are: nobody waits for it."""
        total = None
        for i, (start, stop, _) in enumerate(self.pieces):
            row = [
                _dot(x[start:stop], y[start:stop]) if stop > start else x.new_zeros((), dtype=torch.float64)
                for x, y in pairs
            ]
            numbers = torch.stack([*row, *([x.double() for x in beside[i]] if beside else ())])
            total = numbers if total is None else total + numbers
        assert total is not None
        return total

    def vjp_(
        self,
        optimizer: Optimizer,
        state: OptimizerState,
        gradient: Tensor,
        table: Tensor,
        adjoint: OptimizerState,
        u: Tensor,
        scale: float | Tensor,
        wanted: Collection[str] | None,
    ) -> Tensor:
        """`Optimizer.vjp_table_` on this process's part. Returns the cotangents of the whole: float64 `[G, H + 1]`."""
        if self.microbatches == 1:
            return optimizer.vjp_table_(state, gradient, table, adjoint, u, scale, wanted)
        found = []
        for start, stop, arena in self.pieces:
            if start == stop:
                found.append(table.new_zeros(table.shape[0], table.shape[1] + 1))
                continue
            mine, theirs = (x.part(start, stop, arena) for x in (state, adjoint))
            part = slice(start, stop)
            found.append(optimizer.vjp_table_(mine, gradient[part], table, theirs, u[part], scale, wanted))
        return self.totals(torch.stack([x.to(found[-1].device) for x in found]))


class RankShards(Shards):
    """The share of one rank of several. Each method is called by all of them, in the same order."""

    def __init__(self, ranks: Ranks, arena: Arena, microbatches: int, elementwise: bool):
        super().__init__(ranks, arena, microbatches, elementwise)
        if arena.device.type != "cpu":
            raise BadArgument(
                f"expected a model on the CPU: a training on several processes runs there alone; got {arena.device}"
            )
        if len(set(arena.dtypes)) > 1:
            names = ", ".join(sorted({str(dtype) for dtype in arena.dtypes}))
            raise BadArgument(f"expected trained parameters of one dtype, on several processes; got {names}")
        start, stop = self.ranges[ranks.rank]
        self.layout = Stretch(stop - start, arena.dtype, arena.gradient_dtype, arena.device)
        each = microbatches // ranks.size
        self._places = [places(range(rank * each, (rank + 1) * each)) for rank in range(ranks.size)]

    def state(self, state: OptimizerState) -> OptimizerState:
        return state.part(self.start, self.start + self.layout.numel, self._part).clone()

    def part(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.layout.numel].clone()

    def whole(self, part: Tensor) -> Tensor:
        return self.ranks.joined(part, [stop - start for start, stop in self.ranges])

    def memory(self, into: Tensor | None) -> Tensor | None:
        return None

    def gradient(self, blocks: Blocks[Tensor], into: Tensor | None = None) -> Tensor:
        parts = [[flat[start:stop] for _, flat in blocks.items()] for start, stop in self.ranges]
        send = [part[0] if len(part) == 1 else torch.cat(part) for part in parts]
        length = self.layout.numel
        received = self.ranks.exchange(send, [length * len(held) for held in self._places])
        total: Blocks[Tensor] = Blocks(Tensor.add_)
        for held, flat in zip(self._places, received, strict=True):
            for (level, index), x in zip(held, flat.split(length) if length else [flat] * len(held), strict=True):
                total.add(index, x, level)
        found = total.total()
        return found if into is None else into.copy_(found)

    def add_(self, part: Tensor, blocks: Blocks[list[Tensor | None]]) -> None:
        flats: Blocks[Tensor] = Blocks(Tensor.add_)
        for (level, index), terms in blocks.items():
            # Minus zero changes nothing that it is added to, as a term that is not there.
            flat = torch.full((self.arena.numel,), -0.0, dtype=self.arena.gradient_dtype, device="cpu")
            self._copy(flat, terms)
            flats.add(index, flat, level)
        total = self.gradient(flats)
        part.add_(total if total.dtype == part.dtype else total.to(part.dtype))

    def gathered(
        self, step: int, rows: Sequence[Tensor], parts: Callable[[], Sequence[int]], note: tuple[Any, ...]
    ) -> tuple[Tensor, list[Any]]:
        own = torch.cat(list(rows)).cpu()
        prints = torch.tensor([*parts(), any(note)], dtype=torch.int64, device="cpu").view(torch.float64)
        found = self.ranks.numbers(torch.cat([own, prints]).unsqueeze(0))
        seen, some = found[:, len(own) :].contiguous().view(torch.int64).split([prints.numel() - 1, 1], 1)
        if bool((seen != seen[0]).any()):
            rank = int((seen != seen[0]).any(1).nonzero()[0])
            raise RanksDisagree([f"batches[{step}]"], f"the examples of rank {rank} are not those of rank 0")
        notes = self.ranks.objects(note) if bool(some.any()) else []
        return found[:, : len(own)].reshape(self.microbatches, -1), notes

    def of_all(self, own: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
        rows = [torch.cat([as_bytes(x.contiguous()) for x in tensors]) for tensors in own]
        sizes = [x.nbytes for x in own[0]]
        return [
            [
                part.clone().view(x.dtype).reshape(x.shape)  # a copy begins where its dtype may
                for part, x in zip(row.split(sizes), own[0], strict=True)
            ]
            for row in self.ranks.numbers(torch.stack(rows))
        ]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return dot(x if x.dtype == y.dtype else x.to(y.dtype), y)


def _number(x: Tensor, y: Tensor) -> float:
    return dot_number(x if x.dtype == y.dtype else x.to(y.dtype), y)


def _ranges(bounds: Sequence[int], size: int) -> list[tuple[int, int]]:
    """The ranges of `size` ranks, from where a flat buffer is cut into pieces."""
    each = (len(bounds) - 1) // size
    return [(bounds[rank * each], bounds[(rank + 1) * each]) for rank in range(size)]


def _bounds(arena: Arena, count: int, elementwise: bool) -> list[int]:
    """Where a flat buffer is cut into `count` pieces of about the same length: anywhere, or between parameters."""
    if elementwise:
        unit = ALIGNMENT if arena.numel >= ALIGNMENT * count else 1
        return [i * (arena.numel // unit) // count * unit for i in range(count)] + [arena.numel]
    cuts, ideal = [*arena.offsets, arena.numel], [i * arena.numel / count for i in range(1, count)]
    return [0, *(min(cuts, key=lambda cut: abs(cut - place)) for place in ideal), arena.numel]


def _part(arena: Arena, start: int, stop: int) -> Arena | None:
    """The arena of the parameters in a range of a flat buffer, if there are any."""
    names = [name for name, place in zip(arena.names, arena.offsets, strict=True) if start <= place < stop]
    return arena if len(names) == len(arena.names) else arena.part(names) if names else None
