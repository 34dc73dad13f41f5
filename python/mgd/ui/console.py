"""The form of every recipe: what it found as tables in the terminal, as JSON, and as one page with its pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgd.ui import page as plots
from mgd.ui.options import write_json
from mgd.util.progress import tracked

if TYPE_CHECKING:
    from rich.console import Console

Table = list[list[str]]  # the first row is the head


@dataclass(frozen=True)
class Page:
    """What a reader gets. lead: a paragraph that says what was done and found. tables: title and rows, for the
    terminal. sections: makes those of the page; called only where one is asked for, since pictures need matplotlib.
    verdict: the last line in the terminal."""

    title: str
    lead: str
    tables: Sequence[tuple[str, Table]]
    sections: Callable[[], Sequence[plots.Section]]
    verdict: str = ""


@dataclass
class Reporter:
    """What a recipe tells while it works. progress: show bars. seconds: of its phases, in their order."""

    say: Callable[[str], None] = lambda text: None
    progress: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, words: str = "") -> Iterator[None]:
        """Say `words` (by default the name) and time what follows."""
        self.say(words or name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def bar(self, words: str, total: int) -> AbstractContextManager[Callable[[str], None]]:
        """A bar over `total` things; the block calls what it is given after each of them, with a note."""
        return tracked(words, total, enabled=self.progress)


class Session:
    """A command's console, and where its results go."""

    def __init__(self, command: str, out: Path | None, json: Path | None, threads: int):
        import torch
        from rich.console import Console

        torch.set_num_threads(threads)
        if out:
            plots.require_matplotlib()
        self.command, self.out, self.json = command, out, json
        self.console = Console()
        self.reporter = Reporter(
            lambda text: self.console.print(f"{text} ...", highlight=False), self.console.is_terminal
        )

    def finish(self, page: Page, result: dict[str, Any]) -> None:
        """Show the tables; write the page and the JSON where they were asked for."""
        self.console.print()
        show(page, self.console)
        written = write(page, self.out) if self.out else []
        if self.json:
            write_json(self.json, self.command, result)
            written.append(self.json)
        for path in written:
            self.console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def show(page: Page, console: Console) -> None:
    """The lead and the tables, in the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable

    console.print(page.lead, highlight=False)
    for title, rows in page.tables:
        table = RichTable(title=title, title_justify="left", title_style="bold", header_style="dim", box=SIMPLE_HEAD)
        for i, name in enumerate(rows[0]):
            table.add_column(name, justify="left" if i == 0 else "right", vertical="bottom")
        for row in rows[1:]:
            table.add_row(*row)
        console.print()
        console.print(table, highlight=False)
    if page.verdict:
        console.print(f"\n{page.verdict}", style="bold", highlight=False)


def write(page: Page, folder: str | Path) -> list[Path]:
    """`index.html`, self-contained, and the pictures beside it; gives the paths."""
    return plots.page(folder, page.title, page.lead, page.sections())
