"""The result of an attribution: the scores, questions to them, and what they cost."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgd.attribution import scores as files
from mgd.errors import BadArgument, BadData
from mgd.results import Metagradient
from mgd.util.text import describe


@dataclass
class AttributionReport:
    """What an attribution cost, in this process.

    queries, examples, steps: k, n, T. chunk: the number of queries, or of combinations of them, that shared a sweep.
    chunks_done, chunks_kept: the number of chunks computed now, and of those that an earlier, interrupted call had
    finished. unvisited: the number of
    examples that no step read. seconds: by kind of work; "rehearsal" is the training that every later one must repeat,
    "scores" the writing of the rows. training_seconds: of the rehearsal, a plain training. counts, execution: as in
    `mgd.Report`.
    """

    queries: int
    examples: int
    steps: int
    chunk: int
    unvisited: int
    chunks_done: int = 0
    chunks_kept: int = 0
    training_seconds: float = 0.0
    total_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    execution: str = ""

    def add(self, result: Metagradient) -> None:
        """Add what the metagradient of one chunk cost."""
        for name, spent in result.report.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
        for name, count in result.report.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.execution = result.report.execution
        self.chunks_done += 1

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Add the seconds of the block to those of a kind of work."""
        start = time.perf_counter()
        yield
        self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - start

    @property
    def trainings_per_query(self) -> float | None:
        """Seconds per query in units of the rehearsal; None if an earlier call did part of the work."""
        if self.chunks_kept or not self.training_seconds:
            return None
        return self.total_seconds / self.queries / self.training_seconds

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> AttributionReport:
        return cls(**{name: value for name, value in record.items() if name != "trainings_per_query"})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"trainings_per_query": self.trainings_per_query}


@dataclass
class Estimate:
    """How far estimated scores are off, as forward passes along random signs of the weights measured it.

    combinations: the reverse sweeps. probes: the forward passes. errors: float64 `[k]`, for each query the root mean
    square error of its scores in units of their own; from m probes it is uncertain by a factor of about
    `1 ± 1/sqrt(2 m)`; 0 where no weight changes a query. error: the same of all scores together, which is more certain.
    """

    combinations: int
    probes: int
    errors: Tensor
    error: float

    @classmethod
    def of(cls, true: Tensor, guess: Tensor, combinations: int) -> Estimate:
        """From changes of the queries' losses along probes, float64 `[m, k]`."""
        off, size = (guess - true).square().sum(0), true.square().sum(0)
        errors = torch.where(size > 0, off / size.clamp_min(torch.finfo(size.dtype).tiny), off).sqrt()
        return cls(combinations, len(true), errors, float((off.sum() / size.sum()).sqrt()) if size.any() else 0.0)

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"errors": self.errors.tolist()}


@dataclass
class Attribution:
    """Scores `[k, n]`: the derivative of each query's loss with respect to each training example's weight.

    A positive score means that more weight on the example raises the loss (harmful), a negative one that it lowers the
    loss (helpful). scores: an array, or a read-only memory map of `scores.npy`. values: float64 `[k]`, the losses of
    the queries. queries: their numbers. names: their titles, if they were given any. weights: `[n]`, at which the
    derivatives were taken. visits: int64 `[n]`, how often the training read each example; None if `per_example` does
    not tell. directory: where the scores are stored; None if they are only in memory. estimate: None where the
    scores are exact; else what is known of their error (`attribute(combine=)`).
    """

    scores: np.ndarray
    values: Tensor
    queries: list[int]
    weights: Tensor
    visits: Tensor | None
    report: AttributionReport
    names: list[str] | None = None
    directory: str | None = None
    estimate: Estimate | None = None

    @property
    def unvisited(self) -> Tensor:
        """int64 `[m]`: the training examples that no step read, whose scores are exactly 0.

        If `visits` is unknown, those whose scores are exactly 0 for every query.
        """
        if self.visits is not None:
            return (self.visits == 0).nonzero()[:, 0]
        return torch.from_numpy(np.flatnonzero(~_any_rows(self.scores)))

    def top(self, query: int, count: int = 10) -> tuple[Tensor, Tensor]:
        """The indices of the most helpful and of the most harmful training examples for row `query`, strongest first.

        Each at most `count`, ranked by score times weight. Raises BadArgument if there is no such row.
        """
        if not 0 <= query < len(self.queries):
            raise BadArgument(f"expected a row of the scores in 0..{len(self.queries) - 1}; got {query}")
        row = torch.from_numpy(np.array(self.scores[query])) * self.weights.cpu()
        count = min(count, len(row))
        helpful, harmful = (-row).topk(count), row.topk(count)
        return helpful.indices[helpful.values > 0], harmful.indices[harmful.values > 0]

    def predicted_changes(self, dropped: Tensor | Sequence[int]) -> Tensor:
        """float64 `[k]`: the first-order change of each query's loss if these examples get weight 0.

        dropped: indices of training examples, each once, or a mask, bool `[n]`. Raises BadArgument for anything else.
        """
        index = _dropped(dropped, self.scores.shape[1])
        weights = self.weights.cpu().double()[index]
        part = torch.from_numpy(np.stack([row[index.numpy()] for row in self.scores]))
        return -(part.double() @ weights)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Attribution:
        """The result of `attribute(..., out=directory)`, with its scores memory-mapped after all of them were checked.

        Raises BadData if the attribution is incomplete, UnknownFormat if the directory holds none, CorruptScores or
        CorruptState if it is damaged, and StoreBusy if a process is filling it.
        """
        stored = files.read(directory)
        index = stored.index
        if stored.rows_done < index.shape[0] or stored.report is None:
            raise BadData(
                f"expected a complete attribution; of the {index.shape[0]} queries in {os.fspath(directory)}, "
                f"{stored.rows_done} are done. Repeat the call of `attribute` to continue it."
            )
        return cls(
            scores=stored.scores,
            values=stored.values,
            queries=index.queries,
            weights=stored.weights,
            visits=stored.visits,
            report=AttributionReport.from_dict(stored.report),
            names=index.names,
            directory=os.fspath(directory),
            estimate=None if stored.estimate is None else Estimate(**stored.estimate),
        )


def _dropped(dropped: Tensor | Sequence[int], n: int) -> Tensor:
    """The indices of the dropped examples, int64."""
    index = torch.as_tensor(dropped).cpu()
    if index.dtype == torch.bool:
        if index.shape != (n,):
            raise BadArgument(f"expected a mask of shape [{n}]; got {list(index.shape)}")
        return index.nonzero()[:, 0]
    if index.numel() == 0:
        return index.reshape(0).long()
    if index.ndim != 1 or index.is_floating_point() or not 0 <= int(index.min()) <= int(index.max()) < n:
        raise BadArgument(f"expected indices of training examples in 0..{n - 1}; got {describe(index)}")
    if len(index.unique()) < len(index):
        raise BadArgument("expected every dropped example once; got some of them several times")
    return index


def _any_rows(scores: np.ndarray) -> np.ndarray:
    """bool `[n]`: whether an example has a score other than 0. Row by row, because the scores may not fit in memory."""
    nonzero = np.zeros(scores.shape[1], bool)
    for row in scores:
        nonzero |= row != 0
    return nonzero
