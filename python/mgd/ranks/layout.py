"""Where the processes of a run in a directory keep their parts of it: their number is in the names."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass

_SHARE = re.compile(r"rank (\d+) of (\d+)")


@dataclass(frozen=True, order=True)
class Layout:
    """One directory for each of `size` processes. whole: there is one process, and it has the run's own directory."""

    size: int
    whole: bool = False

    def directory(self, path: str, rank: int) -> str:
        """That of a rank's part of the run in `path`."""
        return path if self.whole else os.path.join(path, f"rank {rank} of {self.size}")


def layouts(path: str) -> dict[Layout, set[int]]:
    """What there is of runs in `path`, as far as this process sees it: of each layout, the ranks with a store."""
    found: dict[Layout, set[int]] = {}
    for marker in glob.glob(os.path.join(glob.escape(path), "*", "MGD_STORE")):
        if name := _SHARE.fullmatch(os.path.basename(os.path.dirname(marker))):
            found.setdefault(Layout(int(name[2])), set()).add(int(name[1]))
    if os.path.exists(os.path.join(path, "MGD_STORE")):
        found[Layout(1, whole=True)] = {0}
    return found
