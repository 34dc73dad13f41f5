"""Limits on this process's memory that are set beside the machine's own: by control groups, and by `ulimit`."""

from __future__ import annotations

import functools
import os
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# By version of control groups: the files with limits, that with the usage, and of `memory.stat` the part of the usage
# that the kernel gives up first: file contents that were not read again.
_FILES = {
    "cgroup2": (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "cgroup": (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}
_UNLIMITED = 1 << 60  # bytes; version 1 writes the largest number of pages


def rooms(root: Path) -> list[int]:
    """Bytes that are left under each limit that is set. root: where `/proc` and `/sys` are found."""
    return [max(0, limit - used) for limit, used in (*_control_groups(root), *_resource_limits(root))]


def _control_groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and usage of this process's groups and all above them."""
    for kind, folder in _folders(root):
        limits, usage, cache = _FILES[kind]
        for limit in filter(None, (_number(folder + name) for name in limits)):
            used = _number(folder + usage)
            if used is not None:
                yield limit, used - _values(folder + "memory.stat").get(cache, 0)


@functools.cache
def _folders(root: Path) -> list[tuple[str, str]]:
    """The version and the folder of this process's groups, and of all above them, each of which may set a limit: SLURM
    and systemd limit a job, a slice or a session, and the process is in a group further down."""
    groups, folders = _groups(root), []
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, *_, options = after.split(" ")
        if kind not in groups or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        top, point = map(PurePosixPath, before.split(" ")[3:5])
        group = groups[kind]
        # The mount shows the groups from `top` on. In a container the process's own may lie elsewhere.
        below = group.relative_to(top) if group.is_relative_to(top) and ".." not in group.parts else PurePosixPath()
        mount = root / point.relative_to("/")
        folders += [(kind, f"{mount / level}/") for level in (below, *below.parents)]
    return folders


def _groups(root: Path) -> dict[str, PurePosixPath]:
    """This process's group of each version that may limit its memory."""
    found = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            found["cgroup" if controllers else "cgroup2"] = PurePosixPath(path)
    return found


def _resource_limits(root: Path) -> Iterator[tuple[int, int]]:
    """`ulimit -v` and `ulimit -d`, with what counts towards them."""
    for which, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit, _ = resource.getrlimit(which)
        if limit != resource.RLIM_INFINITY:
            yield limit, _values(root / "proc/self/status").get(used, 0) * 1024


def _lines(path: str | Path) -> list[str]:
    try:
        with open(path, "rb") as file:  # asked at every metagradient, and so faster than a Path
            return os.fsdecode(file.read()).splitlines()
    except OSError:
        return []


def _number(path: str) -> int | None:
    lines = _lines(path)
    number = int(lines[0]) if lines and lines[0].isdecimal() else None  # no such file, or "max"
    return None if number is not None and number >= _UNLIMITED else number


def _values(path: str | Path) -> dict[str, int]:
    """The whole numbers of lines `name value` or `name: value`."""
    pairs = (line.replace(":", " ").split()[:2] for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
