"""What the system says of itself: files of `/proc` and of the control group."""

from __future__ import annotations

from pathlib import Path


def free_memory() -> int | None:
    """Bytes that this process may still take: free in the system, and within its control group's limit."""
    rooms = []
    meminfo = fields(Path("/proc/meminfo"))
    if "MemAvailable" in meminfo:
        rooms.append(int(meminfo["MemAvailable"].split()[0]) * 1024)
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        rooms.append(max(0, limit - used))
    return min(rooms, default=None)


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
