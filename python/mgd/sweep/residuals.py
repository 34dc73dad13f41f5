"""What steps computed for their second derivatives in the first sweep, as far as there is memory for it."""

from __future__ import annotations

from mgd.step.evaluator import Residuals
from mgd.util.system import resident_memory


class ResidualCache:
    """Holds residuals of logged steps, in bytes that the plan has left.

    room: bytes that it may take. limit: bytes by which the process may grow after the first step that is kept: in a
    fragmented heap, of which malloc can use only a part, residuals take more room than their size (1.8 times as much in
    fine-tuning by LoRA). None: not watched. peak: the most bytes it held.
    """

    def __init__(self, room: int = 0, limit: int | None = None):
        self.room, self.limit = room, limit
        self.held = self.peak = 0
        self._steps: dict[int, tuple[int, list[Residuals]]] = {}  # with their bytes
        self._start: int | None = None
        self._grown = self._unread = 0  # bytes: by how much the process had grown, and what was put since that was read

    def put(self, t: int, residuals: list[Residuals]) -> None:
        """Keep the residuals of step `t`, if there is room."""
        size = sum(part.bytes for part in residuals)
        if self.held + size > self.room or (self.limit is not None and self._growth(size) + size > self.limit):
            return
        self.held += size
        self.peak = max(self.peak, self.held)
        self._steps[t] = size, residuals

    def take(self, t: int) -> list[Residuals] | None:
        """The residuals of step `t`, which are no longer held here."""
        size, residuals = self._steps.pop(t, (0, None))
        self.held -= size
        return residuals

    def _growth(self, size: int) -> int:
        """Bytes by which the process has grown. It takes time to ask, so small residuals do not each time."""
        self._unread += size
        assert self.limit is not None
        if self._start is None or self._unread > self.limit // 1024:
            now, self._unread = resident_memory() or 0, 0
            self._start = now if self._start is None else self._start
            self._grown = now - self._start
        return self._grown
