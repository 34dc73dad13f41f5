"""How results are shown: tables in the terminal, pages with pictures, and the options that the benchmarks share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgd.ui import page as plots
from mgd.ui.options import write_json
from mgd.util.text import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

Rows = Sequence[Sequence[str]]

Core = Annotated[
    int, typer.Option("--core", help="The core to run on; -1: the last one there is, -2: let the system choose.")
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="How often everything is timed, in alternation.")]
Device = Annotated[str, typer.Option("--device", help='Where tensors live: "cpu", "cuda", "cuda:1".')]


def require(device: str) -> None:
    """Raise where torch cannot use the device."""
    import torch

    from mgd.errors import BadArgument

    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise BadArgument(f'expected a device such as "cpu", "cuda" or "cuda:1"; got {device!r}')
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadArgument(f"torch {torch.__version__} finds no GPU here; `mgd doctor` says what this machine offers")


def core_of(option: int) -> int | None:
    return None if option == -2 else option


def console() -> Console:
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=120)


@contextlib.contextmanager
def ticking(console: Console) -> Iterator[Callable[[str], None]]:
    """A status line that says what is being measured; plain lines where the output is no terminal."""
    if not console.is_terminal:
        last = ""

        def say(what: str) -> None:
            nonlocal last
            if (head := what.partition(", round")[0]) != last:  # a line for each thing measured, not each repetition
                last = head
                console.print(f"measuring {head} ...", highlight=False, soft_wrap=True)

        yield say
        return
    with console.status("measuring") as status:
        yield lambda what: status.update(f"measuring {what}")


def table(console: Console, title: str, rows: Rows, caption: str = "") -> None:
    """rows: the first is the header; the first column is text, the others numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=SIMPLE_HEAD)
    for i, column in enumerate(zip(*rows, strict=True)):
        # Where the terminal is narrow, long texts wrap, and numbers stay whole.
        numbers = max(map(len, column)) <= 24
        shown.add_column(column[0], justify="left" if i == 0 else "right", vertical="bottom", no_wrap=numbers)
    for row in rows[1:]:
        shown.add_row(*row)
    console.print()
    console.print(shown, highlight=False)
    if caption:
        console.print(caption, style="dim", highlight=False)


def finish(
    console: Console,
    command: str,
    result: dict[str, Any],
    json: Path | None,
    out: Path | None,
    page: Callable[[], tuple[str, str, Sequence[plots.Section]]],
) -> None:
    """Write what was asked for. page: gives title, lead and sections."""
    if out:
        for path in plots.page(out, *page()):
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    if json:
        write_json(json, command, result)
        console.print(f"wrote {json}", highlight=False, soft_wrap=True)


def ratio(found: dict[str, float], digits: int = 2) -> str:
    """ "3.67 (3.60 - 3.71)": the median, and the 20% and 80% quantiles."""
    return f"{found['median']:.{digits}f} ({found['q20']:.{digits}f} - {found['q80']:.{digits}f})"


def memory(count: float | None, extrapolated: bool = False) -> str:
    return "-" if count is None else ("~" if extrapolated else "") + format_bytes(max(0, count))
