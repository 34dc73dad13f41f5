"""Progress bars of the two sweeps, by rich."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID


class Progress:
    """A bar a phase, shown when `enabled`; `tick(phase, steps)` advances it. The first tick makes the bar: what it
    brings along was done by an earlier process."""

    def __init__(self, steps: int, enabled: bool):
        self.steps, self.enabled = steps, enabled
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Progress:
        if self.enabled:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = (
                TextColumn("{task.description:8}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._display = Bars(*columns, transient=True)
            self._display.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self.enabled:
            self._display.stop()

    def tick(self, phase: str, steps: int = 1) -> None:
        if not self.enabled:
            return
        if phase not in self._bars:
            self._bars[phase] = self._display.add_task(phase, total=self.steps)
        self._display.advance(self._bars[phase], steps)
