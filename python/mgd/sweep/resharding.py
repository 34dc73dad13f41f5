"""A resumable run that goes on with another number of ranks: what each of the old ones kept is cut anew.

Each directory of the old run is opened by one rank that sees it, which gives every rank what is in its new range. The
new directories count once all of them hold all of it; only then are the old ones cleared. So whenever a process dies,
one set of directories is whole; where both are, they hold the same.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mgd.errors import StaleRun, StoreIOError
from mgd.ranks.layout import Layout, layouts
from mgd.ranks.ranks import Ranks
from mgd.ranks.shards import Shards
from mgd.sweep.checkpoint import SHARDED, RunCheckpoint, State
from mgd.sweep.damage import Key, check_layout, layout_of, naming_the_step
from mgd.sweep.damage import Layout as Layouts

Range = tuple[int, int]


def open_run(
    path: str, staging: int, identity: Mapping[str, str], settings: Mapping[str, Any], shards: Shards
) -> RunCheckpoint:
    """This rank's part of the run in `path`: as these ranks left it, else as others did; else a new one.

    Raises StaleRun where it is that of another call, or where no rank sees some directory of the ranks that began it.
    """
    ranks = shards.ranks
    seen = ranks.objects(layouts(path))  # by rank
    # The directory of a run takes no store once it has others inside.
    mine = Layout(ranks.size, whole=ranks.size == 1 and all(layout.whole for layout in seen[0]))
    make = functools.partial(RunCheckpoint, staging=staging, identity=identity, settings=settings)
    run = make(mine.directory(path, ranks.rank), ranks=ranks, share=not mine.whole)
    try:
        with contextlib.ExitStack() as stack:
            others = sorted({layout for each in seen for layout in each} - {mine})
            found = [stack.enter_context(OtherRun.opened(path, other, seen, make, ranks)) for other in others]
            if found:
                _bring_from(found, path, run, shards)
    except BaseException:
        with contextlib.suppress(StoreIOError):
            run.store.close()
        raise
    return run


def _bring_from(found: Sequence[OtherRun], path: str, run: RunCheckpoint, shards: Shards) -> None:
    whole = [other for other in found if other.whole]
    if not shards.ranks.every(run.began):
        if whole:
            whole[0].bring(run, shards)
        elif missing := [each for other in found for each in other.missing]:
            raise StaleRun(
                path,
                [f"the number of processes: what {missing[0]} kept is not in this directory on any process's machine"],
            )
    shards.ranks.every(True)  # has all of its part
    for other in found:
        other.discard()
    shards.ranks.every(True)  # has removed what it had open


class OtherRun:
    """What other ranks kept of a run. readers: for each of them, the rank that has its directory open; None: nobody
    sees it. runs: those that are open here. whole: all are there, and each had begun."""

    def __init__(self, layout: Layout, readers: list[int | None], runs: dict[int, RunCheckpoint], ranks: Ranks):
        self.layout, self.readers, self.runs, self.ranks = layout, readers, runs, ranks
        self.missing = [f"rank {rank} of {layout.size}" for rank, reader in enumerate(readers) if reader is None]
        self.whole = ranks.every(all(run.began for run in runs.values())) and not self.missing

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls,
        path: str,
        layout: Layout,
        seen: Sequence[Mapping[Layout, set[int]]],
        make: Callable[..., RunCheckpoint],
        ranks: Ranks,
    ) -> Iterator[OtherRun]:
        readers: list[int | None] = []
        for rank in range(layout.size):
            sees = [reader for reader, each in enumerate(seen) if rank in each.get(layout, ())]
            readers.append(sees[rank % len(sees)] if sees else None)
        with contextlib.ExitStack() as stack:
            runs = {}
            for rank in (rank for rank, reader in enumerate(readers) if reader == ranks.rank):
                run = make(layout.directory(path, rank), ranks=Ranks(), share=not layout.whole)
                runs[rank] = run
                stack.callback(run.store.close)
            yield cls(layout, readers, runs, ranks)

    def discard(self) -> None:
        """Remove what these ranks kept."""
        for run in self.runs.values():
            run.finish()
            run.store.close()
            run.remove()

    def bring(self, new: RunCheckpoint, shards: Shards) -> None:
        """Write this rank's part of the last checkpoint, and of the entries that it needs, and begin the run."""
        records = {rank: run.records() for rank, run in self.runs.items()}
        numbers = self._common(set(found) for found in records.values())
        if not numbers:
            return
        moves, number = Moves(self, shards), max(numbers)
        state, end = ({rank: found[number][i] for rank, found in records.items()} for i in (0, 1))
        moved = moves.state(state)
        new.renew()
        flat = {"gradient": 1, "snapshot": sum(name.startswith("state.") for name in moved)}
        for key in sorted(self._common(set(run.entries()) for run in self.runs.values())):
            with naming_the_step(key):
                held: dict[int, Any] = {rank: run.store.get(key) for rank, run in self.runs.items()}
                new.store.put(key, moves.entry(key, held, flat[key[0]]), "disk")
        if moved["trained"]:
            new.save_trained(moves.state(end))
        new.save(moved)
        new.commit(self.first({rank: run.settings for rank, run in self.runs.items()}))

    def _common(self, own: Iterable[set[Any]]) -> set[Any]:
        """What all of the old ranks have."""
        return set.intersection(*(found for each in self.ranks.objects(list(own)) for found in each))

    def first(self, held: Mapping[int, Any]) -> Any:
        """What the old rank 0 has."""
        return next(each[0] for each in self.ranks.objects({0: held[0]} if 0 in held else {}) if each)


class Moves:
    """Tensors of old ranks, by their number, become those of new ones. Every rank makes the same calls."""

    def __init__(self, old: OtherRun, shards: Shards):
        self._old, self._ranks = old, shards.ranks
        self._ranges, self._new = shards.ranges_of(old.layout.size), shards.ranges
        self._layouts: dict[str, Layouts] = {}  # of old rank 0, by the kind of entry

    def entry(self, key: Key, held: Mapping[int, Sequence[Tensor]], flat: int) -> list[Tensor]:
        """Those of an entry of the log, or of a snapshot, of which so many are flat buffers, and come first."""
        if key[0] not in self._layouts:
            self._layouts[key[0]] = self._old.first({rank: layout_of(tensors) for rank, tensors in held.items()})
        layout = self._layouts[key[0]]
        for rank, tensors in held.items():
            start, stop = self._ranges[rank]
            flats = [(dtype, (stop - start,)) for dtype, _ in layout[:flat]]
            check_layout(key, layout_of(tensors), [*flats, *layout[flat:]])
        return [
            self._tensor({rank: tensors[i] for rank, tensors in held.items()}, each, i < flat)
            for i, each in enumerate(layout)
        ]

    def state(self, held: Mapping[int, State | None]) -> State:
        """A record of a checkpoint."""
        found = {rank: state for rank, state in held.items() if state is not None}
        values = {rank: {k: v for k, v in state.items() if not isinstance(v, Tensor)} for rank, state in found.items()}
        tensors = {rank: {k: v for k, v in state.items() if isinstance(v, Tensor)} for rank, state in found.items()}
        layout = self._old.first(
            {rank: {k: layout_of([x])[0] for k, x in each.items()} for rank, each in tensors.items()}
        )
        moved = {
            name: self._tensor({rank: each[name] for rank, each in tensors.items()}, kind, name.startswith(SHARDED))
            for name, kind in layout.items()
        }
        reads: dict[str, int] = {}
        for each in self._ranks.objects([state.get("first_read", {}) for state in values.values()]):
            for key, step in (pair for one in each for pair in one.items()):
                reads[key] = min(step, reads.get(key, step))
        value = self._old.first(values)
        return value | ({"first_read": reads} if "first_read" in value else {}) | moved

    def _tensor(self, held: Mapping[int, Tensor], layout: tuple[torch.dtype, tuple[int, ...]], sharded: bool) -> Tensor:
        """sharded: each old rank has its range of it, as each new one will; else all have all of it."""
        dtype, shape = layout
        if sharded:
            return self._moved(held, dtype, self._ranges, self._new)
        numel = torch.Size(shape).numel()
        flat = {0: held[0].reshape(-1)} if 0 in held else {}
        return self._moved(flat, dtype, [(0, numel)], [(0, numel)] * self._ranks.size).reshape(shape)

    def _moved(
        self, held: Mapping[int, Tensor], dtype: torch.dtype, old: Sequence[Range], new: Sequence[Range]
    ) -> Tensor:
        """This rank's range of what lies in the old ranges."""
        me, readers = self._ranks.rank, self._old.readers
        parts = []
        for want in new:
            cut = [held[rank][_within(_overlap(have, want), have)] for rank, have in enumerate(old) if rank in held]
            parts.append(torch.cat(cut) if cut else torch.empty(0, dtype=dtype))
        overlaps = [_overlap(have, new[me]) for have in old]
        sizes = [
            sum(b - a for (a, b), reader in zip(overlaps, readers, strict=False) if reader == rank)
            for rank in range(self._ranks.size)
        ]
        received, found = self._ranks.exchange(parts, sizes), torch.empty(new[me][1] - new[me][0], dtype=dtype)
        taken = [0] * self._ranks.size
        for (a, b), reader in zip(overlaps, readers, strict=False):  # of a buffer that each has, from the first
            assert reader is not None  # the run is whole
            found[_within((a, b), new[me])] = received[reader][taken[reader] : taken[reader] + b - a]
            taken[reader] += b - a
        return found


def _overlap(one: Range, other: Range) -> Range:
    start = max(one[0], other[0])
    return start, max(start, min(one[1], other[1]))


def _within(part: Range, whole: Range) -> slice:
    return slice(part[0] - whole[0], part[1] - whole[0])
