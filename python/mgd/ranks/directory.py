"""The directory of a run that all ranks make alike, such as a descent: rank 0 has it, and tells the others."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

from mgd.errors import StaleRun
from mgd.ranks.ranks import Ranks
from mgd.util.files import path_of
from mgd.util.fingerprint import Identity, differing
from mgd.util.run_directory import RunDirectory
from mgd_kernels.store import Key


class SharedDirectory:
    """`RunDirectory` for several ranks, which make the same calls; for one, just that. What it holds does not depend
    on their number, so that any number continues it. An error of rank 0 is RankFailed on the others."""

    def __init__(self, ranks: Ranks, directory: str | os.PathLike[str], kind: str, identity: Identity):
        self.path: Path = path_of(directory)
        self._ranks = ranks
        self._run: RunDirectory | None = None
        with ranks.call():
            ranks.check_same(lambda: {**identity, "the directory": os.fspath(directory)})
            if ranks.rank == 0:
                self._run = RunDirectory(directory, kind, identity)

    def read(self, key: Key) -> Any:
        """The value under a key, None if there is none. Raises CorruptState if it is not what was written."""
        with self._ranks.call():
            return self._ranks.first(lambda: self._run and self._run.read(key))

    def need(self, key: Key) -> Any:
        """The value under a key that was written before. Raises CorruptState if it is gone, too."""
        with self._ranks.call():
            return self._ranks.first(lambda: self._run and self._run.need(key))

    def check(self, key: Key, identity: Identity, words: str = "") -> None:
        """Raise StaleRun unless the identity that was written under a key is this one. words: behind what differs."""
        with self._ranks.call():
            self._ranks.check_same(lambda: identity)
            if differences := differing(self.need(key), identity):
                raise StaleRun(str(self.path), [name + words for name in differences])

    def write(self, key: Key, value: Any) -> None:
        """Replace the value under a key. It is on the disk when the call returns."""
        with self._ranks.call():
            if self._run is not None:
                self._run.write(key, value)

    def show(self, name: str, value: Any) -> None:
        """Write a value as JSON beside the others, for people. It is never read back."""
        if self._run is not None:
            self._run.show(name, value)

    def __enter__(self) -> SharedDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._run is not None:
            self._run.__exit__(kind, error, trace)
