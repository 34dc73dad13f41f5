"""What joint graphs have computed in logged steps for their second derivatives, as far as there is memory for it."""

from __future__ import annotations

from mgd.autodiff.joint import Residuals
from mgd.util.system import resident_memory


class ResidualCache:
    """Holds what was kept of steps, in bytes that the plan has left.

    room: bytes that it may take. limit: bytes by which the process may grow after the first step that is kept: memory
    in pieces, of which malloc can use only some, takes more room than what lies in it (1.8 times as much in fine-tuning
    by LoRA). None: not watched. peak: bytes that it held at most.
    """

    def __init__(self, room: int = 0, limit: int | None = None):
        self.room, self.limit = room, limit
        self.held = self.peak = 0
        self._steps: dict[int, list[Residuals]] = {}
        self._first: int | None = None

    def put(self, t: int, kept: list[Residuals]) -> None:
        """Keep this of step `t`, if there is room."""
        size = _bytes(kept)
        if self.held + size > self.room or (self.limit is not None and self._growth() + size > self.limit):
            return
        self.held += size
        self.peak = max(self.peak, self.held)
        self._steps[t] = kept

    def take(self, t: int) -> list[Residuals] | None:
        """What was kept of step `t`, which then is no longer."""
        kept = self._steps.pop(t, None)
        if kept is not None:
            self.held -= _bytes(kept)
        return kept

    def _growth(self) -> int:
        now = resident_memory()
        if now is None:
            return 0
        self._first = now if self._first is None else self._first
        return now - self._first


def _bytes(kept: list[Residuals]) -> int:
    return sum(part.bytes for part in kept)
