"""Where the scores of an attribution go: into memory, or into a directory that rank 0 fills and all processes read."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgd.attribution import scores as files
from mgd.attribution.result import Attribution, AttributionReport, Estimate
from mgd.errors import BadArgument
from mgd.ranks.ranks import Ranks
from mgd.results import Trained
from mgd.util.files import path_of
from mgd.util.fingerprint import Identity, digest
from mgd_kernels.store import Key


class HeldScores:
    """Scores in memory, by the methods of `SharedScores`. Nothing outlives the call, so nothing is kept."""

    done: frozenset[int] = frozenset()

    def __init__(self, index: files.Index):
        self.index = index
        self._rows = np.zeros(index.shape, index.dtype)
        self._values = torch.zeros(index.shape[0], dtype=torch.float64, device="cpu")

    def begin(self, rehearsal: Trained, weights: Tensor, visits: Tensor | None) -> None:
        self._weights, self._visits = weights.detach().cpu(), visits

    def write(self, start: int, rows: np.ndarray, losses: Tensor) -> None:
        place = slice(start, start + len(rows))
        self._rows[place], self._values[place] = rows, losses

    def keep(self, key: Key, value: Any) -> None:
        pass

    def kept(self, key: Key) -> Any:
        return None

    def finish(self, report: AttributionReport, estimate: Estimate | None) -> Attribution:
        index, known = self.index, (self._weights, self._visits, report)
        return Attribution(self._rows, self._values, index.queries, *known, index.names, estimate=estimate)


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

    def begin(self, rehearsal: Trained, weights: Tensor, visits: Tensor | None) -> None:
        """As `ScoreFile.begin`."""
        with self._call() as file:
            if file is not None:
                state = digest(rehearsal.losses, rehearsal.model_state)
                file.begin(rehearsal.losses, state, weights, visits)

    def write(self, start: int, rows: np.ndarray, losses: Tensor) -> None:
        """As `ScoreFile.write`. losses: float64 `[c]`."""
        with self._call() as file:
            if file is not None:
                file.write(start, rows, losses.tolist())

    def keep(self, key: Key, value: Any) -> None:
        """As `ScoreFile.keep`."""
        with self._call() as file:
            if file is not None:
                file.keep(key, value)

    def kept(self, key: Key) -> Any:
        """As `ScoreFile.kept`, on every rank."""
        with self._call():
            return self._ranks.first(lambda: self._own.kept(key))

    def finish(self, report: AttributionReport, estimate: Estimate | None) -> Attribution:
        """Store rank 0's report of the complete attribution, and let go of the directory. Returns what is in it, with
        scores that are memory-mapped, on every rank."""
        with self._call() as file:
            loaded = None
            if file is not None:
                file.finish(report.to_dict(), None if estimate is None else vars(estimate))
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
