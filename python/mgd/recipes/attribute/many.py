"""Queries by the hundred: scores of all of them from a few combined sweeps (`mgd.attribute(combine=)`), beside the
exact scores of all of them, and of as many as the same number of sweeps gives."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from mgd.attribution.attribute import attribute
from mgd.attribution.result import Attribution
from mgd.errors import RoughEstimate
from mgd.recipes.attribute.judging import Evaluation
from mgd.recipes.attribute.lds import LDS, linear_datamodeling_score, predictions, subsets
from mgd.recipes.attribute.retraining import retrained, timed, trained
from mgd.recipes.attribute.task import Task
from mgd.ui.console import Reporter

SWEEPS = (16, 100)
RESAMPLES = 200  # of a bootstrap at most: with a thousand queries one takes 10 ms, and the interval is narrow
EXACT, SOME = "exact", "exact, of some queries"


@dataclass
class Way:
    """One way to spend sweeps. sweeps: reverse ones. queries: how many have scores. seconds: of processor time, with
    the rehearsal. lds: by share of examples dropped. error: of all scores, relative; measured: what the estimate said
    itself; rough: how many queries it warned of. None where the scores are exact."""

    name: str
    sweeps: int
    queries: int
    seconds: float
    trainings: float
    lds: dict[float, LDS] = field(default_factory=dict)
    error: float | None = None
    measured: float | None = None
    rough: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"lds": {str(p): {**s.to_dict(), "per_query": None} for p, s in self.lds.items()}}


@dataclass
class Many:
    """The ways, in the order of their sweeps. plain_seconds: processor time of a training without a gradient."""

    task: Task
    plain_seconds: float
    subsets: int
    ways: list[Way]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return self.task.facts() | {
            "seed": self.task.seed,
            "plain_training_seconds": self.plain_seconds,
            "subsets": self.subsets,
            "ways": [way.to_dict() for way in self.ways],
            "seconds": self.seconds,
        }


def by_combinations(
    task: Task, evaluation: Evaluation, sweeps: Sequence[int] = SWEEPS, reporter: Reporter | None = None
) -> Many:
    """The scores of all queries of the task by each number of sweeps, and exactly, judged by the same retrainings."""
    reporter = reporter or Reporter()
    f, z, k = task.function, task.z, task.queries
    whole, plain = trained(task, reporter, time.process_time)
    found: list[tuple[Way, np.ndarray]] = []

    def add(name: str, count: int, work: Callable[[], Attribution]) -> Attribution:
        with reporter.phase(name, f"{name}: {count} sweeps"):
            a, seconds = timed(work, time.process_time)
        found.append((Way(name, count, len(a.queries), seconds, seconds / plain), a.scores))
        return a

    for count in sorted(count for count in sweeps if count < k):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RoughEstimate)  # the table says it
            a = add(f"{count} combined", count, lambda count=count: attribute(f, z, k, task.objectives, combine=count))  # type: ignore[misc]
        assert a.estimate is not None
        found[-1][0].measured, found[-1][0].rough = a.estimate.error, int((a.estimate.errors > 0.5).sum())
    few = min([*sweeps, k])
    add(SOME, few, lambda: attribute(f, z, few, task.objectives, chunk=evaluation.chunk))
    exact = add(EXACT, k, lambda: attribute(f, z, k, task.objectives, chunk=evaluation.chunk)).scores
    for way, table in found:
        if way.measured is not None:
            way.error = float(np.linalg.norm(table - exact) / np.linalg.norm(exact))

    dropped = {p: subsets(len(task), p, evaluation.subsets, task.seed + i) for i, p in enumerate(evaluation.fractions)}
    true = retrained(task, dropped, task.query_losses(whole.model_state), reporter)
    with reporter.phase("judging", "ranking the predictions"):
        for way, table in found:
            way.lds = {p: _lds(table, dropped[p], true[p], evaluation, task.seed) for p in dropped}
    return Many(task, plain, evaluation.subsets, [way for way, _ in found], dict(reporter.seconds))


def _lds(table: np.ndarray, dropped: list[Tensor], true: Tensor, evaluation: Evaluation, seed: int) -> LDS:
    guess = predictions(table, dropped)
    resamples = min(evaluation.resamples, RESAMPLES)
    return linear_datamodeling_score(guess, true[:, : len(table)], resamples=resamples, seed=seed)
