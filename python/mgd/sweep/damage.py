"""Errors of stored entries, in words of the training: which step is concerned, and what to do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from mgd.errors import CorruptState, ForeignEntry, StoreIOError

Key = tuple[str, int]  # ("gradient" or "snapshot", step)
Layout = list[tuple[torch.dtype, tuple[int, ...]]]

ADVICE = "It cannot be recovered: delete the directory, and start again."

_FILE = re.compile(r"step-(\d+)-(gradient|snapshot)\.mgd")


@contextlib.contextmanager
def with_advice() -> Iterator[None]:
    """Errors of damaged entries say what to do about a directory that only a metagradient writes."""
    try:
        yield
    except ForeignEntry:
        raise  # the directory is good without that file
    except CorruptState as error:
        raise CorruptState(error.key, error.chunk, error.found, ADVICE) from error


def layout_of(tensors: Iterable[Tensor]) -> Layout:
    return [(t.dtype, tuple(t.shape)) for t in tensors]


def check_layout(key: Key, found: Layout, expected: Layout) -> None:
    """An entry of other types or shapes is not the one that was put, whatever its checksums say."""
    if found != expected:
        raise CorruptState(key, None, f"expected tensors of {expected}; got {found}", ADVICE)


@contextlib.contextmanager
def naming_the_step(key: Key) -> Iterator[None]:
    """Errors of the store say which step is concerned; their `step` is its number, and `key` that of the entry.

    An error may be that of another entry than `key`, which was being written meanwhile.
    """
    try:
        with with_advice():
            yield
    except CorruptState as error:
        error.step = key[1]  # type: ignore[attr-defined]
        raise
    except StoreIOError as error:
        file = _FILE.search(str(error.path))
        kind, t = (file[2], int(file[1])) if file else key
        named: Any = StoreIOError(error.errno or 0, error.path, f"the {kind} of step {t}: {error.what}")
        named.key, named.step = (kind, t), t
        raise named from error
