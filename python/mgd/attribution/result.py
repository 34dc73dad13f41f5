"""What an attribution gives back: the scores, what can be asked of them, and what they cost."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgd.attribution import scores as files
from mgd.errors import BadArgument, BadData
from mgd.results import Metagradient


@dataclass
class AttributionReport:
    """What an attribution cost, in this process.

    queries, examples, steps: k, n, T. chunk: queries that shared a sweep. chunks_done, chunks_kept: those computed
    now, and those that an earlier, interrupted call had finished. unvisited: examples that no step read. seconds: by
    kind of work; "rehearsal" is the training that every later one must repeat, "scores" the writing of the rows.
    training_seconds: of the rehearsal, a plain training. counts, execution: as in `mgd.Report`.
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
        for name, spent in result.report.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
        for name, count in result.report.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.execution = result.report.execution
        self.chunks_done += 1

    @property
    def trainings_per_query(self) -> float | None:
        """Seconds a query in units of the rehearsal; None where an earlier call did a part of the work."""
        if self.chunks_kept or not self.training_seconds:
            return None
        return self.total_seconds / self.queries / self.training_seconds

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> AttributionReport:
        return cls(**{name: value for name, value in found.items() if name != "trainings_per_query"})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"trainings_per_query": self.trainings_per_query}


@dataclass
class Attribution:
    """Scores `[k, n]`: the derivative of each query's loss with respect to each training example's weight.

    Positive: more weight on the example raises the loss (harmful); negative: it lowers it (helpful). scores: an array,
    or a read-only memory map of `scores.npy`. values: float64 `[k]`, the queries' losses. queries: their numbers.
    weights: `[n]`, at which the derivative was taken. visits: int64 `[n]`, how often the training read each example;
    None where `per_example` does not say. directory: where the scores lie, if they do.
    """

    scores: np.ndarray
    values: Tensor
    queries: list[int]
    weights: Tensor
    visits: Tensor | None
    report: AttributionReport
    names: list[str] | None = None
    directory: str | None = None

    @property
    def unvisited(self) -> Tensor:
        """Training examples that no step read: their scores are exactly 0. Where `visits` is not known, those whose
        scores are exactly 0 for every query."""
        if self.visits is not None:
            return (self.visits == 0).nonzero()[:, 0]
        return torch.from_numpy(np.flatnonzero(~_any_rows(self.scores)))

    def top(self, query: int, count: int = 10) -> tuple[Tensor, Tensor]:
        """The most helpful and the most harmful training examples for row `query`, the strongest first."""
        if not 0 <= query < len(self.queries):
            raise BadArgument(f"expected a row of the scores in 0..{len(self.queries) - 1}; got {query}")
        row = torch.from_numpy(np.array(self.scores[query])) * self.weights.cpu()
        count = min(count, len(row))
        helpful, harmful = (-row).topk(count), row.topk(count)
        return helpful.indices[helpful.values > 0], harmful.indices[harmful.values > 0]

    def predicted_changes(self, dropped: Tensor | Sequence[int]) -> Tensor:
        """float64 `[k]`: the change of each query's loss to expect when these examples get weight 0, to first order.

        dropped: indices, each once, or a mask, bool `[n]`.
        """
        index = _dropped(dropped, self.scores.shape[1])
        weights = self.weights.cpu().double()[index]
        part = torch.from_numpy(np.stack([row[index.numpy()] for row in self.scores]))
        return -(part.double() @ weights)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Attribution:
        """What `attribute(..., out=directory)` came to, its scores memory-mapped. Raises BadData where it is not
        complete, or no attribution."""
        index, (_, weights, visits) = files.read_index(directory), files.read_training(directory)
        if not index.complete or index.report is None:
            raise BadData(
                f"expected a complete attribution; of the {index.shape[0]} queries in {os.fspath(directory)}, "
                f"{index.rows_done} are done. Make the same call of `attribute` again to continue it."
            )
        known = None if visits is None else torch.from_numpy(visits)
        report = AttributionReport.from_dict(index.report)
        values = torch.tensor(index.values(), dtype=torch.float64)
        scores, where = files.open_scores(directory), os.fspath(directory)
        return cls(scores, values, index.queries, torch.from_numpy(weights), known, report, index.names, where)


def _dropped(dropped: Tensor | Sequence[int], n: int) -> Tensor:
    index = torch.as_tensor(dropped).cpu()
    if index.dtype == torch.bool:
        if index.shape != (n,):
            raise BadArgument(f"expected a mask of shape [{n}]; got {list(index.shape)}")
        return index.nonzero()[:, 0]
    if index.numel() == 0:
        return index.reshape(0).long()
    if index.ndim != 1 or index.is_floating_point() or not 0 <= int(index.min()) <= int(index.max()) < n:
        raise BadArgument(f"expected indices of training examples in 0..{n - 1}; got {index.dtype} {list(index.shape)}")
    if len(index.unique()) < len(index):
        raise BadArgument("expected every dropped example once; some are there several times")
    return index


def _any_rows(scores: np.ndarray) -> np.ndarray:
    """bool `[n]`: has an example a score other than 0? Row by row, for the scores may not fit in memory."""
    found = np.zeros(scores.shape[1], bool)
    for row in scores:
        found |= row != 0
    return found
