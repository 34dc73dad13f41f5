"""Where the objects of one shape of plan lie: many placements, and the predicted time of each.

A shape says how long the segments are, and how many snapshots there are of each kind. A placement says for each of the
three kinds of objects how many lie on each tier. The traffic of a kind depends on its own counts alone, but for the
snapshots that a segment's turn reuses. So the traffic is tabulated by kind, and a combination adds three rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mgd.plan.budget import Costs, Sizes
from mgd.plan.layout import reversed_from_residuals
from mgd.plan.reversal import Revolve
from mgd.plan.revolve import advances, advances_from, repetitions
from mgd.plan.tally import Counts, Profile, profile

Seconds = NDArray[np.float64]

#: Up to so many objects of a kind, all ways to split them over the tiers are tried; of more, some.
SNAPSHOTS, GRADIENTS = 10, 24
ALL_SPLITS = 60  # of the log of a short chain on two tiers

#: The most combinations of which all are tried. Of more, those whose snapshots are best where the log fills the tiers.
COMBINATIONS = 2_000

_FIRST, _REPLAY, _REVERSE = range(3)  # the phases


@dataclass(frozen=True)
class Shape:
    """A chain in segments of `length`, with `outer` snapshots of segment starts and `inner` ones inside a segment."""

    chain: int
    length: int
    outer: int
    inner: int

    @cached_property
    def segments(self) -> int:
        return max(1, -(-self.chain // self.length))

    @cached_property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """(length, number of segments of that length), the full ones first. The first segment may be shorter."""
        first = self.chain - (self.segments - 1) * self.length
        if first == self.length:
            return ((self.length, self.segments),)
        return (self.length, self.segments - 1), (first, 1)

    @cached_property
    def replayed(self) -> int:
        """The model steps of the replays after the first sweep."""
        if self.segments == 1:
            return 0
        shorter = self.length - self.parts[-1][0]
        steps = self.length * advances(self.segments, self.outer)
        steps -= shorter * repetitions(self.segments, self.outer)
        return steps - (self.chain - self.length) + (self.chain - self.segments) - (self.length - 1)

    @cached_property
    def updates(self) -> int:
        """The updates that go back over all segments: the advances without those of the pass that logs."""
        return sum(count * (advances(length, self.slots(length)) - (length - 1)) for length, count in self.parts)

    def slots(self, length: int) -> int:
        """The inner snapshots that a segment of this length uses."""
        return min(self.inner, length - 1)


class Placement(NamedTuple):
    """How many objects of each kind lie on each tier."""

    outer: tuple[int, ...]
    inner: tuple[int, ...]
    log: tuple[int, ...]


@dataclass(frozen=True)
class Ways:
    """Ways to place the objects of one kind. counts: [ways, tiers]. written, read: bytes, [ways, phases, tiers]."""

    counts: Counts
    written: Counts
    read: Counts

    @classmethod
    def idle(cls, counts: Counts) -> Ways:
        """Without traffic, to be filled in."""
        shape = (len(counts), 3, counts.shape[1])
        return cls(counts, np.zeros(shape, np.int64), np.zeros(shape, np.int64))


class Snapshots(NamedTuple):
    """Seconds beside the computation and of it, as of `Placements._transfers`: [ways, ...]; of those that are not
    written because they are there already, [inner, outer, ...]. counts: of outer and inner ones, [ways, tiers]."""

    counts: tuple[Counts, Counts]
    outer: tuple[Seconds, Seconds]
    inner: tuple[Seconds, Seconds]
    reused: tuple[Seconds, Seconds] | None = None


@dataclass(frozen=True)
class Placements:
    """The placements of a shape within `limits`, bytes by tier, fastest first, and what they cost."""

    shape: Shape
    sizes: Sizes
    limits: Mapping[str, int]
    costs: Costs
    stop_at: int = 0

    def best(self) -> tuple[float, Placement] | None:
        """The fastest placement and its seconds; of equally fast ones, that with the least on the slowest tiers."""
        shape, state, grad = self.shape, self.sizes.snapshot, self.sizes.gradient
        entries, room = shape.length - 1, np.array(list(self.limits.values()))
        outers = _splits(shape.outer, room // state, SNAPSHOTS if entries else 4 * SNAPSHOTS)
        inners = _splits(shape.inner, room // state, SNAPSHOTS)
        held = state * (outers[:, None] + inners)
        a, b = np.nonzero((held <= room).all(-1))
        free = (room - held[a, b]) // grad
        logs = _filled(entries, free)
        enough = logs.sum(1) == entries
        a, b, free, logs = a[enough], b[enough], free[enough], logs[enough]
        if not len(a):
            return None
        snapshots = self.snapshots(outers, inners)
        if entries:
            splits = _splits(entries, room // grad, GRADIENTS if len(room) > 2 or entries > ALL_SPLITS else ALL_SPLITS)
            if len(a) * len(splits) > COMBINATIONS:
                seconds = self.seconds(snapshots, logs, a, b, np.arange(len(a)))
                some = np.argsort(seconds, kind="stable")[: 1 + COMBINATIONS // len(splits)]
                a, b, free, logs = a[some], b[some], free[some], logs[some]
            pair, split = np.nonzero((splits <= free[:, None]).all(-1))
            a, b = np.concatenate([a, a[pair]]), np.concatenate([b, b[pair]])
            c = np.concatenate([np.arange(len(logs)), len(logs) + split])
            logs = np.concatenate([logs, splits])
        else:
            c = np.arange(len(a))
        seconds = self.seconds(snapshots, logs, a, b, c)
        ties = np.flatnonzero(seconds <= seconds.min() * (1 + 1e-12))
        held = state * (outers[a[ties]] + inners[b[ties]]) + grad * logs[c[ties]]
        k = ties[np.lexsort(held.T)[0]]
        return float(seconds[k]), Placement(*(tuple(x.tolist()) for x in (outers[a[k]], inners[b[k]], logs[c[k]])))

    def snapshots(self, outers: Counts, inners: Counts) -> Snapshots:
        """The times of ways to place the snapshots, by kind."""
        kinds = [self._outer(outers), self._inner(inners)]
        if self.shape.segments > 1:
            kinds.append(self._reused(outers, inners))
        return Snapshots((outers, inners), *map(self._transfers, kinds))

    def seconds(self, snapshots: Snapshots, logs: Counts, a: Counts, b: Counts, c: Counts) -> Seconds:
        """Predicted seconds of combinations, one way for each kind."""
        shape, costs = self.shape, self.costs
        kinds = snapshots.outer, snapshots.inner, self._transfers(self._log(logs))
        beside, busy = (x[a] + y[b] + z[c] for x, y, z in zip(*kinds, strict=True))
        if snapshots.reused is not None:
            saved_beside, saved_busy = snapshots.reused
            beside -= saved_beside[b, a]
            busy -= saved_busy[b, a]
        busy[:, _FIRST] += costs.step * (self.stop_at + shape.chain)
        busy[:, _REPLAY] += costs.step * shape.replayed
        busy[:, _REVERSE] += costs.step * (shape.segments - 1) + costs.update * shape.updates + costs.hvp * shape.chain
        if self.sizes.residuals:
            held = (
                self.sizes.snapshot * (snapshots.counts[0][a] + snapshots.counts[1][b]) + self.sizes.gradient * logs[c]
            )
            busy[:, _REVERSE] -= (costs.hvp - costs.hvp_kept) * self._with_residuals(held)
        return np.maximum(busy, beside.max(-1, initial=0.0)).sum(-1)

    def _with_residuals(self, held: Counts) -> Counts:
        """The steps that are reversed with residuals, where so many bytes are held, [combinations, tiers]."""
        memory, tiers = self.sizes.memory, list(self.limits)
        room = self.limits[memory] - held[:, tiers.index(memory)] if memory in tiers else np.zeros(len(held), np.int64)
        kept = np.minimum(self.shape.length, room // self.sizes.residuals)
        return reversed_from_residuals(self.shape.parts, kept)

    def _transfers(self, ways: Ways) -> tuple[Seconds, Seconds]:
        """Seconds beside the computation, [ways, phases, overlapping tiers], and of the computation, [ways, phases]."""
        costs, tiers = self.costs, list(self.limits)
        parallel = np.array([tier in costs.overlap for tier in tiers], dtype=bool)
        write, read = (np.array([rates[tier] for tier in tiers]) for rates in (costs.write, costs.read))
        seconds = ways.written / write + ways.read / read
        copies = (ways.written + ways.read)[..., parallel].sum(-1) / costs.copy
        return seconds[..., parallel], seconds[..., ~parallel].sum(-1) + copies

    def _outer(self, counts: Counts) -> Ways:
        ways, state = Ways.idle(counts), self.sizes.snapshot
        saves, loads, _ = self._turns(counts)
        ways.written[:, _FIRST] = state * counts
        ways.written[:, _REPLAY] = state * (saves - counts)
        ways.read[:, _REPLAY] = state * loads
        return ways

    def _inner(self, counts: Counts) -> Ways:
        ways, state = Ways.idle(counts), self.sizes.snapshot
        ways.written[:, _FIRST] = state * counts
        for length, count, logging in self._logged_parts():
            slots = self.shape.slots(length)
            up_to = np.minimum(counts.cumsum(1), slots)
            saves, loads, _ = _by_tier(profile(length, Revolve(slots)), slots, up_to)
            ways.written[:, _REPLAY] += state * logging * _steps(up_to)
            ways.written[:, _REVERSE] += state * count * (saves - _steps(up_to))
            ways.read[:, _REVERSE] += state * count * loads
        return ways

    def _log(self, counts: Counts) -> Ways:
        ways, grad = Ways.idle(counts), self.sizes.gradient
        ways.written[:, _FIRST] = grad * counts
        for length, count, logging in self._logged_parts():
            up_to = np.minimum(counts.cumsum(1), length - 1)
            ways.written[:, _REPLAY] += grad * logging * _steps(up_to)
            ways.read[:, _REVERSE] += grad * count * _steps(_reads(length, self.shape.slots(length), up_to))
        return ways

    def _reused(self, outers: Counts, inners: Counts) -> Ways:
        """What segments do not write that start at an outer snapshot on the tier of their own base: [inner, outer]."""
        shape = self.shape
        _, _, turns = self._turns(outers)
        tiers = np.arange(outers.shape[1])
        lowest = (
            tiers == (outers.cumsum(1) < shape.outer).sum(1)[:, None]
        )  # the first segment always starts at this one
        written = np.zeros((len(inners), len(outers), 3, len(tiers)), np.int64)
        for length, _, _ in self._logged_parts():
            base = tiers == (inners.cumsum(1) < shape.slots(length)).sum(1)[:, None]
            if len(shape.parts) == 1:
                reused = turns
            else:
                reused = turns - lowest if length == shape.length else lowest
            written[:, :, _REPLAY] += self.sizes.snapshot * base[:, None] * reused
        return Ways(outers, written, np.zeros_like(written))

    def _turns(self, counts: Counts) -> tuple[Counts, Counts, Counts]:
        shape = self.shape
        return _by_tier(profile(shape.segments, Revolve(max(1, shape.outer))), shape.outer, counts.cumsum(1))

    def _logged_parts(self) -> list[tuple[int, int, int]]:
        """(length, number of segments, number of those that are logged in a replay): the last one is not."""
        parts = self.shape.parts
        return [(length, n, n - (length == self.shape.length)) for length, n in parts if length > 1]


def _by_tier(done: Profile, slots: int, up_to: Counts) -> tuple[Counts, Counts, Counts]:
    """The saves, loads and turns of each tier, which has the slots up to a count from the top."""
    depths = slots - np.concatenate([np.zeros_like(up_to[:1]), up_to])
    saves, loads, turns = (_steps(below[0] - below[1:]) for below in done.below(depths))
    return saves, loads, turns


def _reads(length: int, slots: int, last: Counts) -> Counts:
    """How often the last entries of a segment's log are read.

    Each is read where its step is reversed, and in all passes over it but the one that logs.
    """
    counts, where = np.unique(last, return_inverse=True)
    reads = np.array([advances_from(length, slots, length - 1 - x) for x in counts.tolist()], dtype=np.int64)
    return reads[where].reshape(last.shape)


def _steps(up_to: Counts) -> Counts:
    steps = up_to.copy()  # np.diff takes several times as long
    steps[..., 1:] -= up_to[..., :-1]
    return steps


def _splits(count: int, most: Counts, all_up_to: int) -> Counts:
    """Ways to split `count` objects over the tiers, of which each can hold so many."""
    bounds = itertools.combinations_with_replacement(_levels(count, all_up_to), len(most) - 1)
    counts = _steps(np.array([(*bound, count) for bound in bounds], dtype=np.int64))
    return counts[(counts <= most).all(1)]


@lru_cache(maxsize=1024)
def _levels(count: int, all_up_to: int) -> list[int]:
    """Numbers from 0 to `count`: if they are many, closer together towards both ends."""
    if count <= all_up_to:
        return list(range(count + 1))
    steps = all_up_to // 3
    half = {round((count / 2) ** (i / steps)) for i in range(steps + 1)}
    return sorted({0, count, *half, *(count - x for x in half)})


def _filled(count: int, entries: Counts) -> Counts:
    """`count` objects on the fastest tiers with room for so many."""
    return _steps(np.minimum(entries.cumsum(1), count))
