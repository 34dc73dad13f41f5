"""Numbers for people: bytes, seconds, and tables in plain text."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgtp", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


def parse_bytes(text: int | str) -> int:
    """Bytes from a number or from text such as "1GB" (10**9), "512MiB" (2**20), "1.5 GB", "0"."""
    if isinstance(text, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text.lower())
        if match is None or match[2] not in _UNITS:
            raise ValueError(f'expected a size such as "1GB", "512MiB" or a number of bytes, got {text!r}')
        number, unit = match[1], _UNITS[match[2]]
        return int(number) * unit if number.isdigit() else int(float(number) * unit)
    if isinstance(text, bool) or text != int(text) or text < 0:
        raise ValueError(f"expected a whole, non-negative number of bytes, got {text!r}")
    return int(text)


def format_bytes(count: float) -> str:
    """A byte count for people, in decimal units: 1536 -> "1.54 kB"."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if count < 999.5 or unit == "PB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def format_seconds(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.3g} s"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of an aligned table: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        return "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])

    return [line(head), "  ".join("-" * width for width in widths), *map(line, rows)]
