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


def write(page: Page, folder: str | Path) -> list[Path]:
    """Write every figure as PNG and a self-contained `index.html` into `folder`. Returns the paths."""
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
    index, title, lead = folder / "index.html", html.escape(page.title), html.escape(page.lead)
    write_file(index, _PAGE.format(title=title, lead=lead, body="\n".join(body)))
    return [index, *paths]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = [[html.escape(str(cell)) for cell in row] for row in rows]
    lines = ["<table><thead><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr></thead><tbody>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rest]
    return "\n".join([*lines, "</tbody></table>"])


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #1f2430; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h1, h2 {{ line-height: 1.2 }} h2 {{ margin-top: 2.5rem }} .lead {{ font-size: 1.1rem }}
img {{ max-width: 100%; height: auto }} pre {{ overflow-x: auto; font-size: .85rem }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid #e3e6ec }}
th:first-child, td:first-child {{ text-align: left }}
</style></head><body>
<h1>{title}</h1><p class="lead">{lead}</p>
{body}
</body></html>
"""
