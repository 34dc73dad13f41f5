"""Text for people: bytes, seconds, tables, and what a value is."""

from __future__ import annotations

import re
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from mgd.errors import BadArgument

MOST = 1 << 62  # bytes: as good as no limit, and a number that everything here can hold
_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgtp", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


def parse_bytes(text: int | str) -> int:
    """Bytes from a number or from text such as "1GB" (10**9), "512MiB" (512 * 2**20), "1.5 GB", "0".

    Raises BadArgument if the text is not a size, or the number is negative or not whole.
    """
    if isinstance(text, str):
        match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})\s*([a-z]*)\s*", text.lower())
        if match is None or match[2] not in _UNITS:
            raise BadArgument(f'expected a size such as "1GB", "512MiB" or a number of bytes; got {text[:80]!r}')
        number, unit = match[1], _UNITS[match[2]]
        return min(MOST, int(number) * unit if number.isdigit() else int(float(number) * unit))
    whole = isinstance(text, Integral) or (isinstance(text, Real) and float(text).is_integer())
    if isinstance(text, bool) or not whole or text < 0:
        raise BadArgument(f"expected a whole, non-negative number of bytes; got {text!r}")
    return min(MOST, int(text))


def format_bytes(count: float) -> str:
    """A byte count in decimal units: 1536 -> "1.54 kB"."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if count < 999.5 or unit == "PB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def format_seconds(seconds: float) -> str:
    """A duration in hours, minutes or seconds: 150 -> "2.5 min"."""
    if seconds >= 7200:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.3g} s"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of an aligned table: its first column to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *others]).rstrip()

    return [line(head), "  ".join("-" * width for width in widths), *map(line, rows)]


def describe(value: Any) -> str:
    """What a value is, for error texts: the dtype and shape of a tensor, the type of anything else."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
