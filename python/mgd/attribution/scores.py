"""The k × n scores of an attribution on disk: `scores.npy`, one row per query, and `index.json`, saying what is done.

Each chunk of rows is written with plain file writes when it is ready, and read through a memory map, so the matrix
never has to fit in memory. A chunk counts as done once the index lists it, with a digest of its bytes. The index is
replaced as a whole, after the rows are on disk. So a process that ends at any moment leaves a directory from which the
same call can continue.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mgd.errors import BadData, CorruptScores, StaleRun
from mgd.util.checkpoint_directory import replace_file

FORMAT = 1
SCORES, INDEX, TRAINING = "scores.npy", "index.json", "training.npz"
DIGEST_BYTES = 1 << 24  # read at a time for a digest


@dataclass
class Index:
    """What a directory of scores holds: the contents of `index.json`.

    shape: [queries, training examples]. dtype: that of the scores, as numpy names it. weights: the metaparameter.
    queries: their numbers, as passed to the objectives. names: their titles, if they have any. chunk: the number of
    queries that shared a sweep. identity: digests of what the scores depend on. training: the digest of the trained
    state. unvisited: how many examples no step of the training read. done: one record per finished chunk, with the
    bounds of its rows, the digest of their bytes and the losses of its queries. report: of the whole attribution, once
    it is complete.
    """

    shape: list[int]
    dtype: str
    weights: str
    queries: list[int]
    names: list[str] | None
    chunk: int
    identity: dict[str, str]
    training: str
    unvisited: int = 0
    done: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] | None = None
    format: int = FORMAT

    @property
    def rows_done(self) -> int:
        return sum(record["stop"] - record["start"] for record in self.done)

    @property
    def complete(self) -> bool:
        return self.rows_done == self.shape[0]

    def values(self) -> list[float]:
        """The losses of the queries whose rows are done, in the order of the rows."""
        return [value for record in sorted(self.done, key=lambda r: r["start"]) for value in record["values"]]

    def is_done(self, start: int) -> bool:
        return any(record["start"] == start for record in self.done)


class ScoreFile:
    """A directory that is being filled with scores."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        index: Index,
        losses: Tensor,
        weights: Tensor,
        visits: Tensor | None,
    ):
        """Begin in a new or empty directory, or continue with what is there.

        losses: float64 `[T]`, of the training. weights, visits: `[n]`, of its examples. All are stored with the scores.
        Raises StaleRun if the directory holds other scores, CorruptScores if finished rows were damaged.
        """
        self.path = Path(directory)
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / INDEX).exists():
            self.index = read_index(self.path)
            self._refuse_others(index, losses.numpy())
            self._verify()
        else:
            self.index = index
            shape = (index.shape[0], index.shape[1])
            file = np.lib.format.open_memmap(self.path / SCORES, "w+", np.dtype(index.dtype), shape)
            del file  # leaves a sparse file of the right size
            arrays: dict[str, Any] = {"losses": losses.numpy(), "weights": weights.detach().cpu().numpy()}
            if visits is not None:
                arrays["visits"] = visits.numpy()
            np.savez(self.path / TRAINING, **arrays)
            self._write_index()

    def _refuse_others(self, new: Index, losses: np.ndarray) -> None:
        """Raise StaleRun if the directory holds the scores of another attribution."""
        old = self.index
        fields = ("shape", "dtype", "weights", "queries", "names", "chunk")
        differences = [f"the {name}" for name in fields if getattr(old, name) != getattr(new, name)]
        names = {**old.identity, **new.identity}
        differences += [name for name in names if old.identity.get(name) != new.identity.get(name)]
        if not differences and old.training != new.training:
            step = first_difference(read_training(self.path)[0], losses)
            where = "the trained parameters" if step is None else f"the training's loss at step {step}"
            differences = [where + " (did the batches, the loss or the machine change?)"]
        if differences:
            raise StaleRun(str(self.path), differences)

    def _verify(self) -> None:
        for record in self.index.done:
            if self._digest(record["start"], record["stop"]) != record["digest"]:
                raise CorruptScores(str(self.path / SCORES), record["start"], record["stop"])

    def _layout(self) -> tuple[int, int]:
        """The bytes before the first row, and the bytes of a row."""
        rows = open_scores(self.path)
        return int(rows.offset), int(rows.shape[1] * rows.dtype.itemsize)

    def _digest(self, start: int, stop: int) -> str:
        offset, row = self._layout()
        state, left = hashlib.blake2b(digest_size=16), (stop - start) * row
        with open(self.path / SCORES, "rb") as file:
            file.seek(offset + start * row)
            while left:
                data = file.read(min(left, DIGEST_BYTES))
                if not data:
                    raise CorruptScores(str(self.path / SCORES), start, stop)
                state.update(data)
                left -= len(data)
        return state.hexdigest()

    def write(self, start: int, rows: np.ndarray, values: Sequence[float]) -> None:
        """Store the chunk that begins at row `start`: its rows `[c, n]`, and the losses of its queries, `[c]`."""
        offset, row = self._layout()
        data: Any = np.ascontiguousarray(rows, np.dtype(self.index.dtype)).view(np.uint8)
        with open(self.path / SCORES, "r+b") as file:
            file.seek(offset + start * row)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        record = {"start": start, "stop": start + len(rows), "digest": digest, "values": list(map(float, values))}
        self.index.done.append(record)
        self._write_index()

    def finish(self, report: Mapping[str, Any]) -> None:
        """Store the report of the complete attribution."""
        self.index.report = dict(report)
        self._write_index()

    def _write_index(self) -> None:
        text = json.dumps(asdict(self.index), indent=1)
        replace_file(self.path / INDEX, lambda path: path.write_text(text, "utf-8"))


def read_index(directory: str | os.PathLike[str]) -> Index:
    """The index of a directory. Raises BadData if the directory holds no scores of this format."""
    path = Path(directory) / INDEX
    try:
        record = json.loads(path.read_text("utf-8"))
        if record.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}; got format {record.get('format')!r}")
        return Index(**record)
    except (OSError, ValueError, TypeError) as error:
        raise BadData(f"expected {path} to be the index of an attribution's scores; {error}") from error


def read_training(directory: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The training's losses `[T]`, its examples' weights `[n]` and, if known, how often each was read `[n]`.

    Raises BadData if the directory does not describe a training.
    """
    path = Path(directory) / TRAINING
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["losses"], arrays["weights"], arrays.get("visits")
    except (OSError, ValueError, KeyError) as error:
        raise BadData(f"expected {path} to describe the training of an attribution; {error}") from error


def open_scores(directory: str | os.PathLike[str]) -> np.memmap:
    """The scores `[k, n]` as a read-only memory map. Raises BadData if the file is not one of scores."""
    path = Path(directory) / SCORES
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadData(f"expected {path} to hold an attribution's scores; {error}") from error


def first_difference(first: np.ndarray, second: np.ndarray) -> int | None:
    """The first index at which two vectors differ; None if they are equal."""
    if len(first) != len(second):
        return min(len(first), len(second))
    different = np.flatnonzero(first != second)
    return int(different[0]) if len(different) else None
