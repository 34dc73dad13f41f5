"""Pages: what a command found, for a reader who was not there."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = list[list[str]]  # the first row is the header
WHOLE = 24  # cells of at most this many characters are never wrapped: numbers stay in one piece


@dataclass
class Section:
    """A part of a page. figure: with its file name (without .png). table: rows, the first one the header. listing:
    text whose lines stay as they are."""

    title: str
    text: str = ""
    figure: Figure | None = None
    name: str = ""
    table: Sequence[Sequence[str]] = ()
    listing: str = ""


def _no_sections() -> Sequence[Section]:
    return ()


@dataclass(frozen=True)
class Page:
    """What a reader gets. lead: a paragraph that says what was done and found. tables: title and rows, for the
    terminal. sections: makes the sections of the HTML page; it is called only for `--out`, since pictures need
    matplotlib. verdict: the last line in the terminal."""

    title: str
    lead: str
    tables: Sequence[tuple[str, Table]] = ()
    sections: Callable[[], Sequence[Section]] = _no_sections
    verdict: str = ""


def write(page: Page, folder: str | Path, footer: str = "") -> list[Path]:
    """Write every figure as PNG and a self-contained `index.html` into `folder`. Returns the paths.

    footer: how the page came about, one thing per line.
    """
    from mgd.util.files import write_file  # brings torch

    folder = Path(folder)
    sections = page.sections()
    body, paths = [], []
    for section in sections:
        body.append(f"<section><h2>{html.escape(section.title)}</h2>")
        body += [f"<p>{html.escape(part)}</p>" for part in section.text.split("\n\n") if part]
        if section.table:
            body.append(_table(section.table))
        if section.listing:
            body.append(f"<pre>{html.escape(section.listing)}</pre>")
        if section.figure is not None:
            buffer = io.BytesIO()
            section.figure.savefig(buffer, format="png")
            path = folder / f"{section.name}.png"
            write_file(path, buffer.getvalue())
            paths.append(path)
            data = base64.b64encode(buffer.getvalue()).decode()
            body.append(f'<img alt="{html.escape(section.title, quote=True)}" src="data:image/png;base64,{data}">')
        body.append("</section>")
    if footer:
        body.append(f"<footer>{'<br>'.join(map(html.escape, footer.splitlines()))}</footer>")
    index, title, lead = folder / "index.html", html.escape(page.title), html.escape(page.lead)
    write_file(index, _PAGE.format(title=title, lead=lead, body="\n".join(body)))
    return [index, *paths]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    lines = ['<div class="table"><table><thead>', _row("th", head), "</thead><tbody>"]
    return "\n".join([*lines, *(_row("td", row) for row in rest), "</tbody></table></div>"])


def _row(tag: str, cells: Sequence[str]) -> str:
    """Spaces before a cell's text, which mark a part of the row above, become a margin; short cells stay in one
    line, as in the terminal."""
    out = []
    for cell in map(str, cells):
        text = cell.lstrip(" ")
        classes = " ".join(name for name, holds in (("part", text != cell), ("whole", len(text) <= WHOLE)) if holds)
        out.append(f'<{tag} class="{classes}">{html.escape(text)}</{tag}>')
    return f"<tr>{''.join(out)}</tr>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #1f2430; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h1, h2 {{ line-height: 1.2 }} h2 {{ margin-top: 2.5rem }} .lead {{ font-size: 1.1rem }}
img {{ max-width: 100%; height: auto }} pre, .table {{ overflow-x: auto }} pre {{ font-size: .85rem }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid #e3e6ec }}
th:first-child, td:first-child {{ text-align: left }}
td.whole {{ white-space: nowrap }} .part {{ padding-left: 1.5rem }}
footer {{ margin-top: 3rem; padding-top: .8rem; border-top: 1px solid #e3e6ec; color: #596273; font-size: .85rem;
  overflow-wrap: anywhere }}
</style></head><body>
<h1>{title}</h1><p class="lead">{lead}</p>
{body}
</body></html>
"""
