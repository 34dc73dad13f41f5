"""What the system says of itself: files of `/proc` and of the control group; and what it is asked to do with memory."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from pathlib import Path


def free_memory() -> int:
    """Bytes that this process may still take: free in the system, and within its control group's limit."""
    rooms = []
    meminfo = fields(Path("/proc/meminfo"))
    if "MemAvailable" in meminfo:
        rooms.append(int(meminfo["MemAvailable"].split()[0]) * 1024)
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        rooms.append(max(0, limit - used))
    if not rooms:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(rooms) + _kept_memory()


def resident_memory() -> int | None:
    """Bytes of this process that lie in memory."""
    try:
        with open("/proc/self/statm", "rb") as file:  # at every step of a joint graph: quicker than a Path
            pages = file.read().split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class _Mallinfo(ctypes.Structure):
    """What glibc's mallinfo2 returns; `fordblks` is what malloc holds and nobody uses."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _kept_memory() -> int:
    """Bytes that malloc has from the system and that nobody uses, where `keep_freed_memory` has made it hold them."""
    if keep_freed_memory.cache_info().currsize == 0 or not keep_freed_memory():
        return 0
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:  # glibc before 2.33
        return 0
    mallinfo.restype = _Mallinfo
    return mallinfo().fordblks


def fields(path: Path) -> dict[str, str]:
    """The first value of every `name: value` line; empty where there is no such file."""
    found: dict[str, str] = {}
    try:
        text = path.read_text()
    except OSError:
        return found
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


KEPT = 2**31 - 1  # bytes, the largest number that mallopt takes
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes; glibc raises its own so far, as larger blocks are freed


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep the memory that this process frees, up to 2 GiB, for what it allocates next. Whether it does.

    A step frees what the next one allocates. Where glibc hands it back to the system in between, every page is
    faulted in and cleared again, which took a fifth of a convnet's training step. Whoever sets malloc's environment
    variables has decided otherwise. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc" or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, KEPT))
