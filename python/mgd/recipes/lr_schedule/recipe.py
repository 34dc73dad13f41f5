"""Metagradient descent on a learning-rate schedule, against a grid, random search, TPE and CMA-ES.

A ResNet-9-style network is trained for a few seconds on small real images. From a flat schedule,
metagradients move knots of its logarithm; the searches without gradients get the same objective and, in trainings, the
same budget. The objective is the loss on held-out images; test images, and trainings from other initial weights in
other orders, judge what each of them found.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd import schedules
from mgd.descent.descent import Descent
from mgd.errors import BadArgument
from mgd.function import TrainingFunction
from mgd.recipes.data import Images
from mgd.recipes.lr_schedule import search
from mgd.recipes.lr_schedule.descent import RANGE, Knots, costs, descend_on_schedule
from mgd.recipes.lr_schedule.judging import Judged, judge
from mgd.recipes.lr_schedule.search import Objective, Record
from mgd.recipes.small_images import Task
from mgd.ui.console import Reporter
from mgd.util.fingerprint import digest
from mgd.util.run_directory import RunDirectory
from mgd_kernels import AdamW

DESCENT, GRID = "metagradient descent", "grid"
START = "flat, the start"


@dataclass(frozen=True)
class Settings:
    """meta_steps: of the descent. knots: of the schedule. start: the flat schedule's rate. outer: Adam's learning rate
    on the logarithms of the knots. budget: trainings of each search. seeds: trainings with other initial weights and
    orders that judge each schedule."""

    steps: int = 64
    batch: int = 48
    width: int = 8
    held_out: int = 1000
    tested: int = 5000
    meta_steps: int = 50
    knots: int = 16
    start: float = 1e-3
    outer: float = 0.1
    budget: int = 200
    seeds: int = 8

    def quick(self) -> Settings:
        return replace(
            self, steps=24, batch=32, held_out=300, tested=400, meta_steps=10, knots=6, outer=0.2, budget=40, seeds=2
        )

    def check(self) -> None:
        for name in ("steps", "batch", "meta_steps", "knots", "seeds"):
            if getattr(self, name) < 1:
                raise BadArgument(f"expected {name} >= 1; got {getattr(self, name)}")
        if not RANGE[0] <= self.start <= RANGE[1]:
            raise BadArgument(f"expected a start between {RANGE[0]:g} and {RANGE[1]:g}; got {self.start:g}")
        if not self.outer > 0:
            raise BadArgument(f"expected outer > 0; got {self.outer}")
        if self.budget < 20 or self.budget % 20:
            raise BadArgument(f"expected a budget that is a multiple of 20, as the grid needs it; got {self.budget}")
        if self.knots > self.steps:
            raise BadArgument(f"expected at most one knot per step, {self.steps}; got {self.knots}")


@dataclass
class Found:
    """searches: by name, the descent among them. judged: by name of the schedule. early: the meta-step at which the
    descent first was as good as the grid's best. ratio: seconds of a metagradient in those of a training with its
    objective; trace: what the first one cost beyond that, in the same unit."""

    settings: Settings
    task: Task
    seed: int
    parameters: int
    searches: dict[str, Record]
    descent: Descent
    schedules: dict[str, Tensor]
    judged: dict[str, Judged]
    early: int | None
    ratio: float
    trace: float
    training_seconds: float
    seconds: dict[str, float]

    @property
    def fraction(self) -> float | None:
        """What the descent had spent when it was as good as the grid's best, in parts of the grid's trainings."""
        return None if self.early is None else self.searches[DESCENT].spent[self.early] / self.settings.budget

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
            "grid_matched_at_meta_step": self.early,
            "fraction_of_the_grids_trainings": self.fraction,
            "searches": {
                name: {
                    "best": record.lowest,
                    "what": record.words,
                    "training_equivalents": record.spent[-1],
                    "diverged": sum(not math.isfinite(value) for value in record.values),
                    "values": [_rounded(value) for value in record.values],
                }
                for name, record in self.searches.items()
            },
            "descent": self.descent.to_dict(),
            "schedules": {name: [_rounded(rate) for rate in rates.tolist()] for name, rates in self.schedules.items()},
            "judged": {name: asdict(judged) for name, judged in self.judged.items()},
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
    task = Task.make(train, test, settings.steps * settings.batch, settings.held_out, settings.tested, seed, device)
    function = training(task, settings, seed)
    start = torch.full((settings.knots,), math.log(settings.start))
    if resume is None:
        return _run(task, settings, seed, function, start, None, None, reporter)
    with _opened(Path(resume) / "searches", task, settings, seed, function, start) as kept:
        return _run(task, settings, seed, function, start, kept, Path(resume) / "descent", reporter)


def _run(
    task: Task,
    settings: Settings,
    seed: int,
    function: TrainingFunction,
    start: Tensor,
    kept: RunDirectory | None,
    directory: Path | None,
    reporter: Reporter,
) -> Found:
    """kept: where every training is kept. directory: that of the descent."""
    objective = Objective(function, kept)

    with reporter.phase("timing", "timing a training and its metagradient"):
        training_seconds, ratio, trace = costs(function, {"lr": schedules.from_knots(start, settings.steps)})
    records: dict[str, Record] = {}
    with reporter.phase(DESCENT, f"{settings.meta_steps} meta-steps of descent, {ratio:.2f} trainings each"):
        path = Knots(kept)
        descent = descend_on_schedule(
            function,
            start,
            settings.meta_steps,
            outer=settings.outer,
            directory=directory,
            progress=reporter.progress,
            observe=lambda step, result, variables: path.reached(step.step, variables["log_lr"]),
        )
    records[DESCENT] = record = Record(DESCENT, objective, settings.meta_steps)
    for step in descent.history:
        rates = schedules.from_knots(path.knots[step.step], settings.steps)
        record.add(step.value, rates, f"meta-step {step.step}", ratio * (1 + step.diverged) + trace * (step.step == 0))

    searches: dict[str, Callable[[Record], None]] = {
        GRID: lambda record: search.grid(record, settings.steps),
        "random search": lambda record: search.random(record, settings.steps, seed),
        "TPE": lambda record: search.tpe(record, settings.steps, seed),
        "CMA-ES": lambda record: search.cma_es(record, settings.steps, start, seed),
    }
    for name, go in searches.items():
        with reporter.phase(name, f"{name}: {settings.budget} trainings"), reporter.bar(name, settings.budget) as tick:
            records[name] = Record(name, objective, settings.budget, tick)
            go(records[name])

    early = record.first_at(records[GRID].lowest)
    found = {START: schedules.from_knots(start, settings.steps)}
    found |= {name: r.best for name, r in records.items() if r.best is not None}
    if early is not None and early != descent.best_step:
        found[f"{DESCENT}, meta-step {early}"] = schedules.from_knots(path.knots[early], settings.steps)
    with reporter.phase("judging", f"{len(found)} schedules on test images, {settings.seeds + 1} trainings each"):
        judged = judge(
            task,
            lambda number: training(task, settings, seed + 1000 * number) if number else function,
            settings.seeds + 1,
            found,
            GRID,
            reporter,
        )
    parameters = sum(p.numel() for p in function.model.parameters())
    return Found(
        settings, task, seed, parameters, records, descent, found, judged, early, ratio, trace, training_seconds,
        reporter.seconds,
    )  # fmt: skip


def training(task: Task, settings: Settings, seed: int) -> TrainingFunction:
    """The training whose schedule is sought: network, batches in their order, objective."""
    return TrainingFunction(
        task.network(seed, width=settings.width),
        lambda model, batch, z: F.cross_entropy(model(batch[0]), batch[1]),
        task.batches(settings.batch, settings.steps, seed),
        optimizer=AdamW(lr=settings.start, eps_root=1e-8),
        objective=task.held_out.loss,
        seed=seed,
    )


def _opened(
    folder: Path, task: Task, settings: Settings, seed: int, function: TrainingFunction, start: Tensor
) -> RunDirectory:
    """The directory of this run, refused where it holds another one. A run may be continued with more trainings."""
    prolonged = ("meta_steps", "budget", "seeds")
    mine = {"data": task.name, "seed": seed}
    mine |= {name: value for name, value in asdict(settings).items() if name not in prolonged}
    identity = function.identity({"lr": schedules.from_knots(start, settings.steps)})
    return RunDirectory(folder, "search", identity | {name: digest(value) for name, value in mine.items()})


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
