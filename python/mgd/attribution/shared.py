"""The directory of an attribution on several processes: rank 0 fills it, all of them read what is in it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import Tensor

from mgd.attribution import scores as files
from mgd.attribution.result import Attribution
from mgd.errors import BadArgument
from mgd.ranks.ranks import Ranks
from mgd.util.files import path_of
from mgd.util.fingerprint import Identity, digest


class SharedScores:
    """`ScoreFile` for several ranks, which make the same calls; for one, just that. What it holds does not depend on
    their number. An error of rank 0 is RankFailed on the others.

    done: the first rows of the chunks that an earlier call has finished.
    """

    def __init__(self, ranks: Ranks, directory: str | os.PathLike[str], index: files.Index, identity: Identity):
        self.directory, self.index, self._ranks = directory, index, ranks
        self._file: files.ScoreFile | None = None
        with ranks.call():
            fields = {f"the {name}": digest(value) for name, value in asdict(index).items()}
            ranks.check_same(lambda: {**identity, **fields, "the directory": os.fspath(directory)})
            if ranks.rank == 0:
                self._file = files.ScoreFile(directory, index, identity)
            try:
                self.done: frozenset[int] = ranks.first(lambda: frozenset(self._own.done))
                self._check_seen()
            except BaseException:
                if self._file is not None:
                    self._file.close()
                raise

    @property
    def _own(self) -> files.ScoreFile:
        assert self._file is not None, "rank 0 has it"
        return self._file

    def _check_seen(self) -> None:
        """Raise BadArgument unless every process sees this very directory."""
        if self._ranks.size == 1:
            return
        path = path_of(self.directory)
        mark = self._ranks.first(lambda: f".seen.{secrets.token_hex(8)}")
        if self._file is not None:
            (path / mark).touch(mode=0o600)
        self._ranks.every(True)  # it is there
        blind = [rank for rank, sees in enumerate(self._ranks.objects((path / mark).exists())) if not sees]
        if self._file is not None:
            (path / mark).unlink()
        if blind:
            raise BadArgument(
                f"expected a directory that every process sees, as on a shared file system; rank {blind[0]} does not "
                f"see {os.fspath(self.directory)} as rank 0 does"
            )

    @contextlib.contextmanager
    def _call(self) -> Iterator[files.ScoreFile | None]:
        with self._ranks.call():
            yield self._file

    def begin(self, losses: Tensor, state: str, weights: Tensor, visits: Tensor | None) -> None:
        """As `ScoreFile.begin`."""
        with self._call() as file:
            if file is not None:
                file.begin(losses, state, weights, visits)

    def write(self, start: int, rows: np.ndarray, losses: Tensor) -> None:
        """As `ScoreFile.write`. losses: float64 `[c]`."""
        with self._call() as file:
            if file is not None:
                file.write(start, rows, losses.tolist())

    def finish(self, report: Mapping[str, Any]) -> Attribution:
        """Store rank 0's report of the complete attribution, and let go of the directory. Returns what is in it, with
        scores that are memory-mapped, on every rank."""
        with self._call() as file:
            loaded = None
            if file is not None:
                file.finish(report)
                file.close()
                loaded = Attribution.load(self.directory)
            rest = self._ranks.first(lambda: loaded and replace(loaded, scores=np.empty(0)))
            assert rest is not None
            return loaded or replace(rest, scores=files.mapped(self.directory, self.index))

    def __enter__(self) -> SharedScores:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file is not None:
            self._file.__exit__(*error)
