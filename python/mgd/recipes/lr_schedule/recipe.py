"""Metagradient descent on a learning-rate schedule with one rate for each step, against a grid, TPE and CMA-ES.

A small network is trained for a moment on small real images. From a flat schedule, metagradients move the logarithm of
the rate of every step; the searches without gradients get at least as many trainings. What is sought is a low loss on
held-out images in the mean over trainings: other initial weights, another order. Test images after trainings that no
method has seen judge what each of them found.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgd import schedules
from mgd.descent.descent import Descent
from mgd.errors import BadArgument
from mgd.recipes.data import Images
from mgd.recipes.lr_schedule import search
from mgd.recipes.lr_schedule.descent import RANGE, KnotPath, costs, descend_on_numbered
from mgd.recipes.lr_schedule.judging import Judged, judge
from mgd.recipes.lr_schedule.search import Objective, Record
from mgd.recipes.lr_schedule.trainings import Trainings
from mgd.recipes.small_images import Task
from mgd.ui.console import Reporter
from mgd.util.fingerprint import digest
from mgd.util.run_directory import RunDirectory

DESCENT, GRID, TPE, TOLD, CMA = "metagradient descent", "grid", "TPE", "TPE, told which steps", "CMA-ES"
START, HALF = "flat, the start", ", half way"

# Numbers of trainings. No two methods share one but the grid and TPE, and none has those that judge.
FIXED, OF_DESCENT, OF_CMA, JUDGING = 1, 1_000, 100_000, 200_000


@dataclass(frozen=True)
class Settings:
    """wrong: share of the labels that are drawn at random in half of the steps. meta_steps: of the descent. knots: of
    the schedule; as many as steps give each step its own rate. start: the flat schedule's rate. outer: Adam's learning
    rate on the logarithms of the rates. budget: trainings of each search. trainings: over how many TPE takes the mean.
    seeds: trainings that judge each schedule."""

    steps: int = 48
    batch: int = 32
    width: int = 32
    wrong: float = 0.0
    held_out: int = 1000
    tested: int = 5000
    meta_steps: int = 60
    knots: int = 48
    start: float = 0.05
    outer: float = 0.15
    budget: int = 200
    trainings: int = 4
    seeds: int = 32

    def quick(self) -> Settings:
        return replace(
            self, steps=24, knots=24, held_out=300, tested=400, meta_steps=20, outer=0.2, budget=60, seeds=4
        )  # fmt: skip

    def check(self) -> None:
        for name in ("steps", "batch", "width", "meta_steps", "knots", "trainings", "seeds"):
            if getattr(self, name) < 1:
                raise BadArgument(f"expected {name} >= 1; got {getattr(self, name)}")
        if not RANGE[0] <= self.start <= RANGE[1]:
            raise BadArgument(f"expected a start between {RANGE[0]:g} and {RANGE[1]:g}; got {self.start:g}")
        if not self.outer > 0:
            raise BadArgument(f"expected outer > 0; got {self.outer}")
        if not 0 <= self.wrong <= 1:
            raise BadArgument(f"expected a share of wrong labels between 0 and 1; got {self.wrong}")
        if self.budget < 20 or self.budget % 20 or self.budget < self.trainings:
            raise BadArgument(
                f"expected a budget that is a multiple of 20, as the grid needs it, and no less than the "
                f"{self.trainings} trainings of one value; got {self.budget}"
            )
        if self.knots > self.steps:
            raise BadArgument(f"expected at most one knot per step, {self.steps}; got {self.knots}")


@dataclass
class Found:
    """records: by name of the method, the descent among them. schedules: what each hands in, and what it would have
    handed in at half of the budget (`HALF`). judged: by name of the schedule. noisy: bool `[steps]`, the steps with
    wrong labels. ratio: seconds of a metagradient in those of a training with its objective; trace: what the first one
    cost beyond that, in the same unit."""

    settings: Settings
    task: Task
    seed: int
    parameters: int
    records: dict[str, Record]
    descent: Descent
    schedules: dict[str, Tensor]
    judged: dict[str, Judged]
    noisy: Tensor
    ratio: float
    trace: float
    training_seconds: float
    seconds: dict[str, float]

    def contrast(self, name: str) -> float | None:
        """The rates of the steps with wrong labels in those of the others, by geometric means; None without such."""
        if not bool(self.noisy.any()) or bool(self.noisy.all()):
            return None
        logs = self.schedules[name].double().log()
        return float((logs[self.noisy].mean() - logs[~self.noisy].mean()).exp())

    def to_dict(self) -> dict[str, Any]:
        return {
            "data": self.task.name,
            "images": {part: len(getattr(self.task, part)) for part in ("train", "held_out", "test")},
            "parameters": self.parameters,
            "seed": self.seed,
            "settings": asdict(self.settings),
            "training_seconds": self.training_seconds,
            "metagradient_in_trainings": self.ratio,
            "trace_in_trainings": self.trace,
            "steps_with_wrong_labels": self.noisy.nonzero().flatten().tolist(),
            "searches": {
                name: {
                    "what": record.words,
                    "training_equivalents": record.spent[-1],
                    "diverged": sum(not math.isfinite(value) for value in record.values),
                    "values": [_rounded(value) for value in record.values],
                }
                for name, record in self.records.items()
            },
            "descent": self.descent.to_dict(),
            "schedules": {name: [_rounded(rate) for rate in rates.tolist()] for name, rates in self.schedules.items()},
            "judged": {
                name: {
                    "loss": [_rounded(value) for value in judged.loss],
                    "accuracy": [_rounded(value) for value in judged.accuracy],
                    "more_than_the_descent": judged.more,
                }
                for name, judged in self.judged.items()
            },
            "seconds": self.seconds,
        }


def run(
    train: Images,
    test: Images,
    settings: Settings | None = None,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    reporter: Reporter | None = None,
    device: str = "cpu",
) -> Found:
    """Descend, search, and judge. resume: a directory that keeps every training, to continue an interrupted run."""
    settings, reporter = settings or Settings(), reporter or Reporter()
    settings.check()
    s = settings
    task = Task.make(train, test, s.steps * s.batch, s.held_out, s.tested, seed, device)
    trainings = Trainings(task, s.steps, s.batch, s.width, s.wrong, s.start, seed)
    if resume is None:
        return _run(trainings, settings, None, None, reporter)
    with _opened(Path(resume) / "searches", trainings, settings) as kept:
        return _run(trainings, settings, kept, Path(resume) / "descent", reporter)


def _run(
    trainings: Trainings, settings: Settings, kept: RunDirectory | None, directory: Path | None, reporter: Reporter
) -> Found:
    """kept: where every training is kept. directory: that of the descent."""
    s, seed = settings, trainings.seed
    start = torch.full((s.knots,), math.log(s.start))
    flat = schedules.from_knots(start, s.steps)
    with reporter.phase("timing", "timing a training and its metagradient"):
        training_seconds, ratio, trace = costs(trainings, flat)
    with reporter.phase(DESCENT, f"{s.meta_steps} meta-steps of descent, {ratio:.2f} trainings each"):
        path = KnotPath(kept)
        descent = descend_on_numbered(
            lambda i: trainings(OF_DESCENT + i),
            start,
            s.meta_steps,
            outer=s.outer,
            directory=directory,
            progress=reporter.progress,
            observe=path.observe,
        )
    records = {DESCENT: _counted(descent, path, s, ratio, trace)}

    objective = Objective(trainings, kept, (FIXED,))
    several = objective.of(range(FIXED, FIXED + s.trainings))
    fresh = lambda generation: objective.of((OF_CMA + generation,))
    searches: dict[str, tuple[int, Objective, Callable[[Record], None]]] = {}
    searches[GRID] = 1, objective, lambda record: search.grid(record, s.steps)
    searches[TPE] = s.trainings, several, lambda record: search.tpe(record, s.steps, seed)
    if bool(trainings.noisy.any()):
        marked = trainings.noisy
        searches[TOLD] = s.trainings, several, lambda record: search.tpe(record, s.steps, seed, marked=marked)
    searches[CMA] = 1, objective, lambda record: search.cma_es(record, s.steps, start, seed, fresh=fresh)
    for name, (cost, values, go) in searches.items():
        with reporter.phase(name, f"{name}: {s.budget} trainings"), reporter.bar(name, s.budget // cost) as tick:
            records[name] = Record(name, values, s.budget, tick, cost)
            go(records[name])

    found = {START: flat} | {name: record.best for name, record in records.items()}
    for name, record in records.items():
        if name != GRID and (half := record.answer_within(s.budget / 2)) is not None:
            found[name + HALF] = half
    with reporter.phase("judging", f"{len(found)} schedules on test images, {s.seeds} trainings each"):
        judged = judge(trainings.task, trainings, range(JUDGING, JUDGING + s.seeds), found, DESCENT, reporter)
    return Found(
        s, trainings.task, seed, trainings.parameters, records, descent, found, judged, trainings.noisy, ratio, trace,
        training_seconds, reporter.seconds,
    )  # fmt: skip


def _counted(descent: Descent, path: KnotPath, settings: Settings, ratio: float, trace: float) -> Record:
    """The descent as a search: what each meta-step cost, and what it would have handed in after it."""
    record = Record(DESCENT, lambda rates: math.nan, settings.budget)
    for step in descent.history:
        record.add(step.value, ratio * (1 + step.diverged) + trace * (step.step == 0))
        record.answer(schedules.from_knots(path.answer(step.step), settings.steps), f"after meta-step {step.step}")
    return record


def _opened(folder: Path, trainings: Trainings, settings: Settings) -> RunDirectory:
    """The directory of this run, refused where it holds another one. A run may be continued with more trainings."""
    prolonged = ("meta_steps", "budget", "seeds")
    mine: dict[str, Any] = {"data": trainings.task.name, "seed": trainings.seed}
    mine |= {name: value for name, value in asdict(settings).items() if name not in prolonged}
    function, z = trainings(FIXED)
    identity = function.identity(z | {"lr": torch.full((settings.steps,), settings.start)})
    return RunDirectory(folder, "search", identity | {name: digest(value) for name, value in mine.items()})


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
