"""Memory as the system reports it, and how malloc is told to treat it."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

from mgd.util import limits


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still allocate: free in the system, and within the limits of its control groups and
    of `ulimit`. root: where `/proc` and `/sys` are found."""
    available = _available(root)
    if available is None:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([available, *limits.rooms(root)]) + _unused_heap()


class _Mallinfo(ctypes.Structure):
    """The result of glibc's mallinfo2. `fordblks`: bytes that malloc holds and that are not in use."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _unused_heap() -> int:
    """Bytes that malloc holds and that are not in use, if `keep_freed_memory` has made it hold on to them."""
    if keep_freed_memory.cache_info().currsize == 0 or not keep_freed_memory():
        return 0
    mallinfo = _mallinfo()
    return 0 if mallinfo is None else mallinfo().fordblks


@functools.cache
def _mallinfo() -> Callable[[], _Mallinfo] | None:
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:  # glibc before 2.33
        return None
    mallinfo.restype = _Mallinfo
    return mallinfo


def busy_cores(seconds: float = 0.2, root: Path = Path("/")) -> float | None:
    """How many cores other programs keep busy; None where the system does not say. Sleeps for so many seconds."""

    def worked() -> float:
        user, nice, system, _, _, *others = map(int, (root / "proc/stat").read_text().split("\n", 1)[0].split()[1:9])
        return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")

    try:
        before, start = worked(), time.perf_counter()
        time.sleep(seconds)
        return round((worked() - before) / (time.perf_counter() - start), 2)
    except (OSError, ValueError):
        return None


def fields(path: Path) -> dict[str, str]:
    """The first value of every `name: value` line; empty if there is no such file."""
    values: dict[str, str] = {}
    try:
        text = path.read_text()
    except OSError:
        return values
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            values.setdefault(name.strip(), value.strip())
    return values


def _available(root: Path) -> int | None:
    """Bytes that the system says are available. It is asked at every metagradient, and so faster than `fields`."""
    try:
        with open(root / "proc/meminfo", "rb") as file:
            _, found, rest = file.read().partition(b"MemAvailable:")
    except OSError:
        return None
    return int(rest.split(maxsplit=1)[0]) * 1024 if found else None


MUCH = 512 << 20  # bytes of a heap that are worth the time to fault them in again


def return_freed_memory(least: int = 0) -> None:
    """Give what malloc holds and nothing uses back to the system, where glibc can: after work of another kind than what
    follows, whose pieces would not fit into the gaps. least: not if it is fewer bytes, as far as glibc tells."""
    if least and (mallinfo := _mallinfo()) is not None and mallinfo().fordblks < least:
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library


FAULT = 0.25e-9  # seconds per byte to fault memory in again
SPARED = 0.05  # of the time of what follows


def return_freed_memory_before(seconds: float) -> None:
    """The same, before something that takes so long, where that is long against faulting the memory in again."""
    if seconds * SPARED < MUCH * FAULT or (mallinfo := _mallinfo()) is None:
        return
    if MUCH < mallinfo().fordblks < seconds * SPARED / FAULT:
        return_freed_memory()


_TRIM_THRESHOLD = 2**31 - 1  # bytes, the largest number that mallopt takes
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MMAP_THRESHOLD = 32 << 20  # bytes; the most to which glibc itself raises its threshold as larger blocks are freed


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep up to 2 GiB of the memory that this process frees, for its next allocations.

    A step frees what the next one allocates. If glibc returns that memory to the system in between, every page is
    faulted in and cleared again. This holds for the whole process and cannot be undone, so nothing in this package does
    it but its command line. Environment variables that configure malloc take precedence, and other C libraries are left
    alone. Returns whether glibc keeps the memory.
    """
    if platform.libc_ver()[0] != "glibc" or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))
