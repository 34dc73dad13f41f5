"""Progress bars, drawn by rich: for the two sweeps, and for loops over whole trainings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import TaskID


class Progress:
    """One bar per phase, shown if `enabled`. `tick(phase, steps)` advances it.

    The first tick of a phase creates its bar. In a resumed run it also reports the steps that an earlier process did.
    """

    def __init__(self, steps: int, enabled: bool):
        self.steps, self.enabled = steps, enabled
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Progress:
        if self.enabled:
            self._display = _bars()
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


@contextlib.contextmanager
def tracked(words: str, total: int, done: int = 0, enabled: bool = True) -> Iterator[Callable[[str], None]]:
    """A bar for `total` items, `done` of them finished already. Yields `tick(note)`, to be called after each item."""
    if not enabled:
        yield _nothing
        return
    with _bars() as display:
        task = display.add_task(words, total=total, completed=done)

        def tick(note: str = "") -> None:
            display.update(task, advance=1, description=f"{words}  {note}".rstrip())

        yield tick


def _nothing(note: str = "") -> None:
    pass


def no_tick(phase: str, steps: int = 1) -> None:
    """The progress of a sweep that nobody watches."""


def _bars() -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, transient=True)
