"""What steps computed for their second derivatives in the first sweep, as far as there is memory for it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor

from mgd.step.evaluator import Residuals
from mgd.sweep.slabs import Layout, Slab, Slabs

FRAGMENTED = 2  # a heap in pieces took 1.8 times the size of what was kept (fine-tuning by LoRA)
_Reference = tuple[int, int]  # the address of a tensor that is held where it is, and its bytes


@dataclass
class _Kept:
    residuals: list[Residuals]
    places: list[tuple[Slab, int]]
    references: set[_Reference]
    bytes: int
    beside: int


class ResidualCache:
    """Holds residuals of logged steps, as many as there is room for.

    Where the room is ample, they stay where they are, and may take up to twice their size in a heap that they leave in
    pieces. Otherwise they are copied into slabs, and the originals let go. A step's inputs, and residuals on a GPU,
    always stay, and count once, however many steps hold them. Inputs count although the caller may hold them as well,
    since batches may be made anew at each access; a view counts its own bytes. What cannot be copied, an autograd
    graph, counts twice.

    room: bytes that all of this may take. steps: how many may come. peak: the most bytes it held. step_bytes: what one
    step takes, once one has come; without what several hold, if there was room for several.
    """

    def __init__(self, room: int = 0, steps: int = 0):
        self.room, self.steps = room, steps
        self._ample: bool | None = None
        self.kept = self.peak = 0
        self.step_bytes = 0
        self._held_steps = self._held_bytes = 0
        self._steps: dict[int, _Kept] = {}
        self._slabs = Slabs()
        self._beside = 0  # bytes that stay where they are
        self._references: dict[_Reference, int] = {}  # how many steps hold it
        self._too_large: int | None = None  # bytes of graphs for which there was no room, since something was let go

    @property
    def left(self) -> int:
        """Bytes that what a step computes may take, as far as it is known that there is room for it, and for what it
        takes beside."""
        free = max(0, self.room - self.kept - self._beside)
        return free if self._too_large is None else min(free, self._too_large - 1)

    def missed(self, needed: int) -> None:
        """A step did not keep this many bytes, for which there is no room."""
        self.step_bytes = self.step_bytes or needed

    def put(self, t: int, residuals: list[Residuals]) -> None:
        """Keep the residuals of step `t`, if there is room."""
        if not self.room and self.step_bytes:
            return
        given = [x for part in residuals for x in part.given]
        storages: dict[int, int] = {}
        if self._ample is not False:
            whole = [x.untyped_storage() for part in residuals for x in part.tensors if isinstance(x, Tensor)]
            storages = {x.data_ptr(): x.nbytes() for x in whole}
        if self._ample is None:
            self._ample = None if not storages else 0 < self.steps * FRAGMENTED * sum(storages.values()) <= self.room
        layout = None if self._ample else Layout(x for part in residuals for x in part.tensors)
        references = {(x.data_ptr(), x.nbytes) for x in (given if layout is None else [*layout.apart, *given])}
        if layout is None:
            references |= storages.items()
        beside = sum([size for address, size in references if (address, size) not in self._references])
        held = sum([part.held for part in residuals])
        stays = FRAGMENTED * held
        beside += stays
        needed = beside + (sum(layout.pieces) if layout is not None else 0)
        self.step_bytes = self.step_bytes or needed
        room = self.room - self._slabs.size - self._beside - beside
        if not self.room or room < 0:
            self._too_large = held or self._too_large
            return
        places, copied = [], 0
        if layout is not None:
            slabs = self._slabs.hold(layout.pieces, room)
            if slabs is None:
                return
            places, copied = slabs, sum(layout.pieces)
            copies = iter(layout.copied(places))
            for part in residuals:
                part.tensors = list(itertools.islice(copies, len(part.tensors)))
        for reference in references:
            self._references[reference] = self._references.get(reference, 0) + 1
        self._beside += beside
        self._steps[t] = _Kept(residuals, places, references, copied, stays)
        self.kept += copied
        self._held_steps, self._held_bytes = self._held_steps + 1, self._held_bytes + needed
        self.step_bytes = -(-self._held_bytes // self._held_steps)
        self.peak = max(self.peak, self.kept + self._beside)

    def take(self, t: int) -> list[Residuals] | None:
        """The residuals of step `t`, which are no longer held here."""
        kept = self._steps.pop(t, None)
        if kept is None:
            return None
        self._too_large = None
        self._slabs.release(kept.places)
        self.kept -= kept.bytes
        self._beside -= kept.beside
        for reference in kept.references:
            holders = self._references.pop(reference) - 1
            if holders:
                self._references[reference] = holders
            else:
                self._beside -= reference[1]
        return kept.residuals

    def clear(self) -> None:
        """Let go of everything."""
        for t in list(self._steps):
            self.take(t)
