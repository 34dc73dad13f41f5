"""The shape of a plan: the chain in logged segments, and the tier of every object.

The chain of N = T training steps is cut into n segments of L steps (the first may be shorter), and an *outer* schedule
reverses the chain of segments. To turn a segment, the model advances over it while its gradients are logged. The last
one is not logged: its step is turned immediately, and its gradient is computed for that (the training's last step is
turned where the first sweep reaches it). Then an *inner* schedule, whose advances are elementwise updates, goes back
over the segment. So the log holds L - 1 gradients. L = N is the full log: the model runs T times. L = 1 is plain
checkpointing.

With revolve as the outer schedule, s snapshots and r repetitions, the model advances over r N - L C(s+r, s+1) steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mgd.plan.actions import Action, Advance, Drop, Load, Reverse, Save
from mgd.plan.budget import Costs, Sizes
from mgd.plan.reversal import Revolve, Rule, reversal
from mgd.plan.revolve import advances_from, repetitions
from mgd.plan.tally import Slots, Tally, tally


@dataclass(frozen=True)
class Phase:
    """The work of one phase: the numbers of model steps, updates and adjoint steps, and the bytes moved by tier.

    kept: of the adjoint steps, those with the residuals that the step left.
    """

    name: str
    model: int
    update: int
    adjoint: int
    written: tuple[int, ...]
    read: tuple[int, ...]
    kept: int = 0

    def seconds(self, tiers: Sequence[str], costs: Costs) -> float:
        """The time of the computation and of its own copies, or of the slowest parallel transfer if that is longer."""
        computing, copies, beside = self._parts(tiers, costs)
        return max(computing + sum(copies.values()), *beside.values(), 0.0)

    def limit(self, tiers: Sequence[str], costs: Costs) -> str:
        """What takes the time: "computing", or moving data, such as "reading from disk"."""
        computing, copies, beside = self._parts(tiers, costs)
        if computing + sum(copies.values()) >= max(beside.values(), default=0.0):
            return max(copies, key=copies.__getitem__) if sum(copies.values()) > computing else "computing"
        slowest = max(beside, key=beside.__getitem__)
        i = tiers.index(slowest)
        writing = self.written[i] / costs.write[slowest] > self.read[i] / costs.read[slowest]
        return f"writing to {slowest}" if writing else f"reading from {slowest}"

    def _parts(self, tiers: Sequence[str], costs: Costs) -> tuple[float, dict[str, float], dict[str, float]]:
        """Seconds of the work, of the copies that add to it, and of the transfers beside it by tier."""
        work = self.model * costs.step + self.update * costs.update + self.adjoint * costs.hvp
        work -= self.kept * (costs.hvp - costs.hvp_kept)
        copies, beside = {}, {}
        for tier, written, read in zip(tiers, self.written, self.read, strict=True):
            parallel = tier in costs.overlap
            if parallel:
                beside[tier] = written / costs.write[tier] + read / costs.read[tier]
            copies[f"writing to {tier}"] = written / (costs.copy if parallel else costs.write[tier])
            copies[f"reading from {tier}"] = read / (costs.copy if parallel else costs.read[tier])
        return work, copies, beside


@dataclass(frozen=True)
class Layout:
    """A chain of `chain` steps, at least 0, in segments of `length`, with its slots and log entries by tier, fastest
    first. kept: how many steps' residuals are held at a time, in the room that is left.

    All tiers are fullest at the same moment, the end of the first sweep.
    """

    tiers: tuple[str, ...]
    sizes: Sizes
    chain: int
    length: int
    rule: Rule
    outer: Slots
    inner: Slots
    log: tuple[int, ...]
    kept: int = 0
    segments: int = field(init=False)
    first: int = field(init=False)

    def __post_init__(self) -> None:
        segments = max(1, -(-self.chain // self.length))
        object.__setattr__(self, "segments", segments)
        object.__setattr__(self, "first", self.chain - (segments - 1) * self.length)

    @classmethod
    def fit(
        cls, limits: Mapping[str, int], sizes: Sizes, chain: int, length: int, rule: Rule, outer: int, inner: int
    ) -> Layout | None:
        """Place the `inner` slots, then the log, then the `outer` slots, each on the fastest tiers with room.

        None if there is not enough room.
        """
        free = list(limits.values())

        def place(count: int, size: int) -> tuple[int, ...]:
            counts: list[int] = []
            for i, room in enumerate(free):
                counts.append(min(count - sum(counts), room // size))
                free[i] -= counts[-1] * size
            return tuple(counts)

        inner_slots = place(inner, sizes.snapshot)
        log = place(length - 1, sizes.gradient)
        outer_slots = place(outer, sizes.snapshot)
        if (sum(inner_slots), sum(log), sum(outer_slots)) != (inner, length - 1, outer):
            return None
        return cls(tuple(limits), sizes, chain, length, rule, Slots(outer_slots), Slots(inner_slots), log).keeping(
            limits
        )

    def keeping(self, limits: Mapping[str, int]) -> Layout:
        """The layout with as many steps' residuals as there is room for."""
        memory = self.sizes.memory
        if not self.sizes.residuals or memory not in self.tiers or self.chain == 0:
            return self
        room = limits[memory] - self.peak[self.tiers.index(memory)]
        return replace(self, kept=min(self.length, room // self.sizes.residuals))

    @property
    def peak(self) -> tuple[int, ...]:
        """The most bytes held at any time, by tier."""
        slots = zip(self.outer.counts, self.inner.counts, self.log, strict=True)
        return tuple((o + i) * self.sizes.snapshot + g * self.sizes.gradient for o, i, g in slots)

    def actions(self, origin: int) -> Iterator[Action]:
        """The actions of the plan. Chain step 0 is training step `origin`."""
        if origin:
            yield Advance(origin)
        shift = origin + self.first - self.length
        for kind, segment, depth in reversal(self.segments, self.rule):
            start = shift + segment * self.length if segment else origin
            if kind == "save":
                yield Save(start, self.tiers[self.outer.tier(depth)])
            elif kind == "load":
                yield Load(start)
            elif kind == "advance":
                yield Advance(start)
            else:
                yield from self._turn(start, shift + (segment + 1) * self.length, depth)

    def _turn(self, start: int, stop: int, depth: int) -> Iterator[Action]:
        """Turn the segment start..stop-1. `depth`: that of the outer snapshot at its start; -1 if there is none."""
        has_snapshot = depth >= 0
        if stop - start <= 1:
            if has_snapshot:
                yield Drop(start)
            if start < stop:
                yield Reverse(start)
            return
        slots = self.inner.fastest(stop - start - 1)
        reuses_snapshot = has_snapshot and self.outer.tier(depth) == slots.tier(0)
        if has_snapshot and not reuses_snapshot:  # the start will be loaded often: move it to where that is cheap
            yield Drop(start)
        logging, position = True, start
        for kind, i, level in reversal(stop - start, Revolve(slots.total)):
            step = start + i
            if kind == "save":
                if not (reuses_snapshot and i == 0):
                    yield Save(step, self.tiers[slots.tier(level)])
            elif kind == "load":
                yield Load(step)
            elif kind == "advance":
                if logging:
                    yield from self._logged(position, step, stop - 1)
                else:
                    yield Advance(step)
                position = step
            else:
                logging = False
                if level >= 0:
                    yield Drop(step)
                yield Reverse(step)

    def _pieces(self, entries: int) -> Iterator[tuple[int, int, int]]:
        """(tier index, low, high) for a segment's log of `entries` entries. The fastest tier has the last ones."""
        high = entries
        for i, room in enumerate(self.log):
            low = max(0, high - room)
            if low < high:
                yield i, low, high
            high = low

    def _logged(self, start: int, stop: int, end: int) -> Iterator[Action]:
        """Advance from start to stop and log, in a segment whose last log entry is that of step end-1."""
        for i, low, high in reversed(list(self._pieces(end - start))):
            if start + low < stop:
                yield Advance(min(stop, start + high), self.tiers[i])

    # --- accounting: what `actions` adds up to ------------------------------------------------------------------

    def _lengths(self) -> tuple[tuple[int, int], ...]:
        """(length, number of segments of that length)."""
        if self.first == self.length:
            return ((self.length, self.segments),)
        return (self.length, self.segments - 1), (self.first, 1)

    @functools.lru_cache(maxsize=256)  # noqa: B019  # layouts are small; short trainings count the same ones often
    def phases(self, origin: int) -> tuple[Phase, Phase, Phase]:
        """The first sweep; the replays of the model after it; the reverse sweep proper."""
        state, grad = self.sizes.snapshot, self.sizes.gradient
        outer = tally(self.segments, self.rule, self.outer)
        none = (0,) * len(self.tiers)

        swept = self._first_saves()
        first_written = _sum(_times(state, swept), _times(state, self.inner.counts), _times(grad, self.log))
        replay_written = _times(state, _sum(outer.saves, _times(-1, swept)))
        written = read = none
        updates = 0
        for length, count in self._lengths():
            if length <= 1:
                continue
            slots, log = self.inner.fastest(length - 1), self._log_of(length)
            inner = tally(length, Revolve(slots.total), slots)
            pass_saves = slots.counts  # one in each slot while the gradients are logged
            logging = count - (length == self.length)  # the last segment's turn belongs to the first sweep
            replay_written = _sum(replay_written, _times(logging, _sum(_times(state, pass_saves), _times(grad, log))))
            base = slots.between(0, 1)
            reuses = self._reused_snapshots(length, outer, base)
            replay_written = _sum(replay_written, _times(-state * reuses, base))
            written = _sum(written, _times(count * state, _sum(inner.saves, _times(-1, pass_saves))))
            reads = _sum(_times(state, inner.loads), _times(grad, self._log_reads(length, slots.total)))
            read = _sum(read, _times(count, reads))
            updates += count * (inner.advances - (length - 1))

        steps = self.length * outer.advances - (self.length - self.first) * self._first_segment_passes()
        replayed = steps - (self.chain - self.length) + (self.chain - self.segments) - (self.length - 1)
        turned = self.segments - 1
        kept = int(reversed_from_residuals(self._lengths(), self.kept)) if self.sizes.residuals else 0
        return (
            Phase("first sweep", origin + self.chain, 0, 0, first_written, none),
            Phase("replay", replayed, 0, 0, replay_written, _times(state, outer.loads)),
            Phase("reverse sweep", turned, updates, self.chain, written, read, kept),
        )

    def _first_saves(self) -> tuple[int, ...]:
        """The outer snapshots that the first sweep takes, by tier."""
        if isinstance(self.rule, Revolve):
            return self.outer.counts
        count = 0
        for move in reversal(self.segments, self.rule):
            if move.kind == "turn":
                break
            count += move.kind == "save"
        return self.outer.between(0, count)

    def _first_segment_passes(self) -> int:
        if self.first == self.length:
            return 0  # `phases` multiplies it by 0
        return repetitions(self.segments, self.outer.total)

    def _reused_snapshots(self, length: int, outer: Tally, base: tuple[int, ...]) -> int:
        """How many segments of this length start at an outer snapshot that is already on the tier they need."""
        if self.segments == 1:
            return 0
        tier = base.index(1)
        first = self.outer.tier(0) == tier  # the first segment always starts at an outer snapshot, that of depth 0
        if self.first == self.length:
            return outer.held[tier]
        return outer.held[tier] - first if length == self.length else int(first)

    def _log_of(self, length: int) -> tuple[int, ...]:
        counts = [0] * len(self.tiers)
        for i, low, high in self._pieces(length - 1):
            counts[i] = high - low
        return tuple(counts)

    def _log_reads(self, length: int, slots: int) -> tuple[int, ...]:
        """Reads of log entries in one segment, by tier: one per entry as its step is reversed, the rest for updates."""
        reads = [0] * len(self.tiers)
        for i, low, high in self._pieces(length - 1):
            reads[i] = advances_from(length, slots, low) - advances_from(length, slots, high)
        return tuple(reads)


def reversed_from_residuals(parts: Sequence[tuple[int, int]], kept: Any) -> Any:
    """How many steps are reversed with residuals of their own, where `kept` steps' are held at a time.

    parts: (length, number of segments), the full ones first. A segment keeps those of its first steps, as it is logged.
    Its last step is turned on the spot, and so needs no room for them; that of the training is held like the others.
    """
    segments = sum(count for _, count in parts)
    whole = parts[0][0]
    steps = sum(count * np.minimum(kept, length - 1) for length, count in parts)
    return steps + segments - 1 + (np.minimum(kept, whole) - np.minimum(kept, whole - 1))


def _sum(*vectors: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*vectors, strict=True)))


def _times(factor: int, vector: Sequence[int]) -> tuple[int, ...]:
    return tuple(factor * x for x in vector)
