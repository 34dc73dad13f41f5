"""What every command does with what it finds: progress and tables in the terminal, a page, and JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgd.ui import page as pages
from mgd.ui.charts import require_matplotlib
from mgd.ui.page import WHOLE, Page, Table
from mgd.ui.result import provenance, write_json
from mgd.util.progress import tracked

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 120  # of what is written to a file or a pipe


@dataclass
class Reporter:
    """What a recipe reports while it works. progress: show bars. seconds: of its phases, in their order."""

    say: Callable[[str], None] = lambda text: None
    progress: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, words: str = "") -> Iterator[None]:
        """Say `words` (by default the name) and time the block."""
        self.say(words or name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def bar(self, words: str, total: int) -> AbstractContextManager[Callable[[str], None]]:
        """A bar over `total` things. The block receives a function to call after each of them, with a note."""
        return tracked(words, total, enabled=self.progress)


class Session:
    """One run of a command: its console, and where its results go.

    out: folder for the page; json: file for the result; threads: for torch to use, None leaves them as they are.
    """

    def __init__(self, command: str, out: Path | None = None, json: Path | None = None, threads: int | None = None):
        from rich.console import Console

        if out:
            require_matplotlib()
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self.command, self.out, self.json = command, out, json
        terminal = Console()
        self.console = terminal if terminal.is_terminal else Console(width=WIDTH)
        self.reporter = Reporter(lambda text: self.print(f"{text} ..."), self.console.is_terminal)

    def print(self, text: str, style: str = "", whole: bool = False) -> None:
        """A paragraph. whole: break no line."""
        self.console.print(text, style=style or None, highlight=False, markup=False, soft_wrap=whole)

    def table(self, title: str, rows: Table, caption: str = "") -> None:
        """A table, and below it what its columns mean."""
        print_table(self.console, title, rows)
        if caption:
            self.print(caption, style="dim")

    @contextmanager
    def status(self) -> Iterator[Callable[[str], None]]:
        """A status line. The block receives a function that sets what is being measured. Where the output is not a
        terminal, each thing measured gets a line of its own, its repetitions do not."""
        if self.console.is_terminal:
            with self.console.status("measuring") as line:
                yield lambda what: line.update(f"measuring {what}")
            return
        last = ""

        def say(what: str) -> None:
            nonlocal last
            if (head := what.partition(", round")[0]) != last:
                last = head
                self.print(f"measuring {head} ...", whole=True)

        yield say

    def finish(self, page: Page, result: dict[str, Any]) -> None:
        """Show the page's tables, and write what was asked for."""
        self.console.print()
        show(page, self.console)
        self.write(page, result)

    def write(self, page: Page | None, result: dict[str, Any]) -> None:
        """Write the page and the JSON where they were asked for."""
        paths = pages.write(page, self.out, provenance(self.command, result)) if self.out and page else []
        if self.json:
            write_json(self.json, self.command, result)
            paths.append(self.json)
        for path in paths:
            self.print(f"wrote {path}", whole=True)


def show(page: Page, console: Console) -> None:
    """The lead, the tables and the verdict, in the terminal."""
    console.print(page.lead, highlight=False, markup=False)
    for title, rows in page.tables:
        print_table(console, title, rows)
    if page.verdict:
        console.print(f"\n{page.verdict}", style="bold", highlight=False, markup=False)


def print_table(console: Console, title: str, rows: Table) -> None:
    """rows: the first one is the header. The first column is text, the others are numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(title=title, title_justify="left", title_style="bold", header_style="dim", box=SIMPLE_HEAD)
    for i, column in enumerate(zip(*rows, strict=True)):
        longest = max(len(line) for cell in column for line in cell.split("\n"))
        table.add_column(
            Text(column[0]), justify="left" if i == 0 else "right", vertical="bottom", no_wrap=longest <= WHOLE
        )
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    console.print()
    console.print(table, highlight=False)
