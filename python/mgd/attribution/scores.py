"""The k × n scores of an attribution on disk: `scores.npy`, one row per query, in the directory of the run.

The matrix may be larger than memory. Its rows are written with plain file writes when a chunk of them is ready, and
read through a memory map. The run's entries (`mgd.util.run_directory`) say what is done: a chunk counts once its entry,
with a digest of its bytes, is there, which is after its rows are on the disk. So a process that ends at any moment
leaves a directory from which the same call can continue.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgd.errors import BadData, CorruptScores, StaleRun, StoreIOError, UnknownFormat
from mgd.util.files import path_of
from mgd.util.fingerprint import Identity, digest
from mgd.util.run_directory import RunDirectory
from mgd_kernels.store import Key

KIND = "attribution"
SCORES, INDEX = "scores.npy", "index.json"
LASTING = ("index", "training", "estimate", "report")  # entries, beside those of chunks
DIGEST_BYTES = 1 << 24  # read at a time for a digest


@dataclass(frozen=True)
class Index:
    """What a directory of scores holds.

    shape: [queries, training examples]. dtype: that of the scores, as numpy names it. weights: the metaparameter.
    queries: their numbers, as passed to the objectives. names: their titles, if they have any. chunk: the number of
    queries that shared a sweep. unvisited: how many examples no step of the training read. combine, probes: as of
    `attribute`, where the scores are an estimate; a chunk is then one of combinations.
    """

    shape: list[int]
    dtype: str
    weights: str
    queries: list[int]
    names: list[str] | None
    chunk: int
    unvisited: int = 0
    combine: int | None = None
    probes: int | None = None


class ScoreFile:
    """A directory that is being filled with scores. Close it, or use it in a `with` block."""

    def __init__(self, directory: str | os.PathLike[str], index: Index, identity: Identity):
        """Begin in a new or empty directory, or continue with what is there.

        Raises StaleRun, StoreBusy, UnknownFormat and CorruptState as `RunDirectory` does, and CorruptScores if finished
        rows were damaged.
        """
        fields = {f"the {name}": digest(value) for name, value in asdict(index).items()}
        self.index = index
        self._run = RunDirectory(directory, KIND, {**identity, **fields})
        try:
            self.matrix = Matrix(self._run.path / SCORES, index)
            if "index" not in self._run:
                self.matrix.make()
                self._run.write("index", asdict(index))
            self._done = done(self._run)
            with self.matrix.opened() as file:
                for record in self._done.values():
                    self.matrix.verify(file, record)
        except BaseException as error:
            self._run.__exit__(type(error), error, None)
            raise

    def begin(self, losses: Tensor, state: str, weights: Tensor, visits: Tensor | None) -> None:
        """Store the training whose scores these are, or compare it with the one that is there.

        losses: float64 `[T]`. state: a digest of the trained state. weights, visits: `[n]`, of its examples. Raises
        StaleRun if the training does not repeat the stored one.
        """
        if (kept := self._run.read("training")) is None:
            kept = {"losses": losses, "state": state, "weights": weights.detach().cpu(), "visits": visits}
            self._run.write("training", kept)
        elif kept["state"] != state:
            step = first_difference(kept["losses"].numpy(), losses.numpy())
            where = "the trained parameters" if step is None else f"the training's loss at step {step}"
            raise StaleRun(str(self._run.path), [where + " (did the batches, the loss or the machine change?)"])

    @property
    def done(self) -> set[int]:
        """The first rows of the chunks that are done."""
        return set(self._done)

    def write(self, start: int, rows: np.ndarray, values: Sequence[float]) -> None:
        """Store the chunk that begins at row `start`: its rows `[c, n]`, and the losses of its queries, `[c]`."""
        data = np.ascontiguousarray(rows, self.matrix.dtype).reshape(-1).view(np.uint8).data
        with self.matrix.opened(write=True) as file:
            self.matrix.write(file, start, data)
        record = {
            "start": start,
            "stop": start + len(rows),
            "digest": hashlib.blake2b(data, digest_size=16).hexdigest(),
            "values": [float(value) for value in values],
        }
        self._run.write(("chunk", start), record)
        self._done[start] = record

    def keep(self, key: Key, value: Any) -> None:
        """Store what rows will be made of, until all of them are done."""
        self._run.write(key, value)

    def kept(self, key: Key) -> Any:
        """What an earlier call has stored under a key; None if nothing."""
        return self._run.read(key)

    def finish(self, report: Mapping[str, Any], estimate: Mapping[str, Any] | None = None) -> None:
        """Store the report of the complete attribution, what is known of the error of scores that are an estimate, and
        an index for people. What `keep` stored is removed."""
        if estimate is not None:
            self._run.write("estimate", dict(estimate))
        self._run.write("report", dict(report))
        facts = asdict(self.index) | {"values": losses_of(self._done), "report": dict(report)}
        self._run.show(INDEX, facts | ({} if estimate is None else {"estimated error": estimate["error"]}))
        for key in self._run.keys():
            if key not in LASTING and not _of_chunk(key):
                self._run.remove(key)

    def close(self) -> None:
        self._run.close()

    def __enter__(self) -> ScoreFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._run.__exit__(*error)


class Matrix:
    """The file `scores.npy`: a header of numpy's, and rows. Nothing is written to a link, or to a file of others."""

    def __init__(self, path: Path, index: Index):
        self.path, self.dtype = path, np.dtype(index.dtype)
        self.shape = (index.shape[0], index.shape[1])
        header = io.BytesIO()
        description = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(header, description)
        self.header = header.getvalue()
        self.row = self.shape[1] * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        return len(self.header) + self.shape[0] * self.row

    def make(self) -> None:
        """Make the file, sparse and of its full size, unless it is there already."""
        with self._naming_the_file():
            temporary = self.path.with_name(f".{SCORES}.{secrets.token_hex(8)}")
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
                try:
                    file.write(self.header)
                    file.truncate(self.bytes)
                    file.flush()
                    os.fsync(file.fileno())
                    if not os.path.lexists(self.path):  # else `opened` sees whether it is what it should be
                        os.replace(temporary, self.path)
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(temporary)

    @contextlib.contextmanager
    def opened(self, write: bool = False) -> Iterator[int]:
        """A file descriptor. Raises UnknownFormat unless the file is the one that was made here."""
        with self._naming_the_file():
            flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(self.path, flags)
            try:
                facts = os.fstat(file)
                if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1:
                    raise UnknownFormat(str(self.path), "no regular file, or one that has another name, too")
                if facts.st_size != self.bytes or os.pread(file, len(self.header), 0) != self.header:
                    raise CorruptScores(str(self.path), 0, self.shape[0])
                yield file
            finally:
                os.close(file)

    def write(self, file: int, start: int, data: memoryview) -> None:
        place = len(self.header) + start * self.row
        while data:
            count = os.pwrite(file, data, place)
            data, place = data[count:], place + count
        os.fsync(file)

    def verify(self, file: int, record: Mapping[str, Any]) -> None:
        """Raise CorruptScores unless the rows of a chunk have the bytes that were written."""
        state, left = hashlib.blake2b(digest_size=16), (record["stop"] - record["start"]) * self.row
        place = len(self.header) + record["start"] * self.row
        while left:
            data = os.pread(file, min(left, DIGEST_BYTES), place)
            if not data:
                break
            state.update(data)
            left, place = left - len(data), place + len(data)
        if state.hexdigest() != record["digest"]:
            raise CorruptScores(str(self.path), record["start"], record["stop"])

    def mapped(self, file: int) -> np.memmap:
        """The scores `[k, n]` as a read-only memory map."""
        with open(os.dup(file), "rb") as mine:
            return np.memmap(mine, self.dtype, "r", len(self.header), self.shape)

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except StoreIOError:
            raise
        except FileNotFoundError as error:
            raise CorruptScores(str(self.path), 0, self.shape[0]) from error
        except OSError as error:
            raise StoreIOError(error.errno or 0, str(self.path), "cannot use the file of scores") from error


def done(run: RunDirectory) -> dict[int, dict[str, Any]]:
    """The records of finished chunks, by their first row and in the order of rows."""
    starts = sorted(key[1] for key in run.keys() if isinstance(key, tuple) and _of_chunk(key))
    return {start: run.read(("chunk", start)) for start in starts}


def _of_chunk(key: Key) -> bool:
    return isinstance(key, tuple) and key[0] == "chunk"


def mapped(directory: str | os.PathLike[str], index: Index) -> np.memmap:
    """The scores `[k, n]` of a directory whose entries another process has read and checked, as a memory map."""
    matrix = Matrix(path_of(directory) / SCORES, index)
    with matrix.opened() as file:
        return matrix.mapped(file)


def chunk_of(directory: str | os.PathLike[str]) -> int | None:
    """The number of queries per chunk of the attribution in a directory; None if there is none."""
    if not (path_of(directory) / "MGD_STORE").exists():
        return None
    with RunDirectory.existing(directory, KIND) as run:
        found = run.read("index")
    return None if found is None else Index(**found).chunk


def losses_of(records: Mapping[int, Mapping[str, Any]]) -> list[float]:
    """The losses of the queries whose rows are done, in the order of rows."""
    return [value for start in sorted(records) for value in records[start]["values"]]


@dataclass(frozen=True)
class Stored:
    """A directory of scores as it was read. rows_done: how many rows are there. report: None until all of them are.
    estimate: of their error, where they are an estimate."""

    index: Index
    scores: np.memmap
    values: Tensor
    weights: Tensor
    visits: Tensor | None
    rows_done: int
    report: dict[str, Any] | None
    estimate: dict[str, Any] | None


def read(directory: str | os.PathLike[str]) -> Stored:
    """What a directory of scores holds, all of it checked. Raises as `ScoreFile` does, and BadData where it has only
    begun."""
    with RunDirectory.existing(directory, KIND) as run:
        records = done(run)
        if not records and "training" not in run:
            raise BadData(f"expected a complete attribution; that in {os.fspath(directory)} has only begun")
        index, training = Index(**run.need("index")), run.need("training")
        report = run.read("report")
        estimate = run.need("estimate") if report is not None and index.combine is not None else None
    matrix = Matrix(run.path / SCORES, index)
    with matrix.opened() as file:  # others may read the entries meanwhile: rows that are done do not change
        for record in records.values():
            matrix.verify(file, record)
        scores = matrix.mapped(file)
    rows = sum(record["stop"] - record["start"] for record in records.values())
    values = torch.tensor(losses_of(records), dtype=torch.float64, device="cpu")
    return Stored(index, scores, values, training["weights"], training["visits"], rows, report, estimate)


def first_difference(first: np.ndarray, second: np.ndarray) -> int | None:
    """The first index at which two vectors differ; None if they are equal."""
    if len(first) != len(second):
        return min(len(first), len(second))
    different = np.flatnonzero(first != second)
    return int(different[0]) if len(different) else None
