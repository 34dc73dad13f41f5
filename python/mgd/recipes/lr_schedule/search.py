"""Searches for learning-rate schedules without gradients: a grid, random search, Optuna's TPE, and CMA-ES.

All of them, and metagradient descent beside them, minimise one `Objective`. A `Record` is what a search asks for
values, one training each, and what it leaves behind. A training that diverges is infinitely bad.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mgd import schedules
from mgd.errors import BadArgument, MissingPackage, NonFiniteState
from mgd.function import TrainingFunction
from mgd.util.fingerprint import digest
from mgd.util.run_directory import RunDirectory

KINDS = ("one-cycle", "linear", "cosine")
PEAKS, PARTS = (3e-4, 1e-1), (1e-2, 1.0)  # ranges of the peak, and of start and end as parts of it; both logarithmic


class Objective:
    """The objective after a training with these learning rates `[T]`; infinity where the training diverges.

    run: keeps every value, so that a search that is run again does not train again.
    seconds: of the trainings that were run.
    """

    def __init__(self, function: TrainingFunction, run: RunDirectory | None = None):
        self.function, self._run = function, run
        self.seconds: list[float] = []
        self._known: dict[str, float] = (run.read("values") if run is not None else None) or {}

    def __call__(self, rates: Tensor) -> float:
        key = digest(rates)
        if key not in self._known:
            start = time.perf_counter()
            try:
                value = float(self.function.value({"lr": rates.detach()}))
            except NonFiniteState:
                value = math.inf
            self.seconds.append(time.perf_counter() - start)
            self._known[key] = value
            if self._run is not None:
                self._run.write("values", self._known)
        return self._known[key]


@dataclass
class Record:
    """The trainings of one search. values: the objective of each. spent: training-equivalents after each. best: the
    rates of the lowest value, and `words` that say what they are."""

    name: str
    objective: Callable[[Tensor], float]
    budget: int
    tick: Callable[[str], None] = lambda note: None
    values: list[float] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)
    best: Tensor | None = None
    words: str = ""

    @property
    def left(self) -> int:
        return self.budget - len(self.values)

    @property
    def lowest(self) -> float:
        return min(self.values, default=math.inf)

    def __call__(self, rates: Tensor, words: str) -> float:
        value = self.objective(rates)
        self.add(value, rates, words, 1.0)
        return value

    def add(self, value: float, rates: Tensor, words: str, cost: float) -> None:
        """A training that was paid for elsewhere, at this cost in training-equivalents."""
        if self.best is None or value < self.lowest:
            self.best, self.words = rates.detach().clone(), words
        self.values.append(value)
        self.spent.append((self.spent[-1] if self.spent else 0.0) + cost)
        self.tick(f"{self.name}, best {self.lowest:.4f}")

    def lowest_within(self, budget: float) -> float:
        """The lowest value within a budget of training-equivalents."""
        pairs = zip(self.spent, self.values, strict=True)
        return min((value for spent, value in pairs if spent <= budget), default=math.inf)

    def first_at(self, value: float) -> int | None:
        """The first training whose value is at most this, if there is one."""
        return next((i for i, v in enumerate(self.values) if v <= value), None)


@dataclass(frozen=True)
class Shape:
    """A schedule of a usual shape. start, end: parts of the peak; a cosine begins at its peak."""

    kind: str
    peak: float
    start: float
    end: float

    def rates(self, steps: int) -> Tensor:
        if self.kind == "cosine":
            return schedules.cosine(steps, self.peak, self.end * self.peak)
        known = {"one-cycle": schedules.one_cycle, "linear": schedules.linear}
        if self.kind not in known:
            raise BadArgument(f"expected a shape of {list(KINDS)}; got {self.kind!r}")
        return known[self.kind](steps, self.peak, self.start * self.peak, self.end * self.peak)

    def __str__(self) -> str:
        start = "" if self.kind == "cosine" else f", from {self.start:.2g} of it"
        return f"{self.kind}, peak {self.peak:.2g}{start}, to {self.end:.2g} of it"


def shapes(peaks: int) -> Iterator[Shape]:
    """A grid of 20 shapes per peak: one-cycle and linear with three starts and three ends each, cosine with two ends.
    Peaks are evenly spaced between the logarithms of `PEAKS`; 10 of them make the grid of 200."""
    low, high = map(math.log, PEAKS)
    for i in range(peaks):
        peak = math.exp(low + (high - low) * (i + 0.5) / peaks)
        for kind, start, end in itertools.product(KINDS[:2], (0.03, 0.2, 1.0), (0.01, 0.1, 0.5)):
            yield Shape(kind, peak, start, end)
        for end in (0.01, 0.1):
            yield Shape("cosine", peak, 1.0, end)


def grid(record: Record, steps: int) -> None:
    """As many of the grid's shapes as the budget pays for, which is a multiple of 20."""
    if record.budget < 20 or record.budget % 20:
        raise BadArgument(f"expected a budget that is a multiple of 20, the shapes of one peak; got {record.budget}")
    for shape in shapes(record.budget // 20):
        record(shape.rates(steps), str(shape))


def random(record: Record, steps: int, seed: int) -> None:
    """Random shapes, from the same ranges as the grid's."""
    generator = torch.Generator().manual_seed(seed)
    while record.left:
        kind = KINDS[int(torch.randint(len(KINDS), (1,), generator=generator))]
        u = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        peak, start, end = (low * (high / low) ** x for (low, high), x in zip((PEAKS, PARTS, PARTS), u, strict=True))
        shape = Shape(kind, peak, start, end)
        record(shape.rates(steps), str(shape))


def tpe(record: Record, steps: int, seed: int) -> None:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) over the shapes of `random`."""
    optuna: Any = _package("optuna", "searches by TPE")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    while record.left:
        trial = study.ask()
        shape = Shape(
            trial.suggest_categorical("kind", KINDS),
            trial.suggest_float("peak", *PEAKS, log=True),
            trial.suggest_float("start", *PARTS, log=True),
            trial.suggest_float("end", *PARTS, log=True),
        )
        study.tell(trial, record(shape.rates(steps), str(shape)))


def cma_es(record: Record, steps: int, start: Tensor, seed: int, width: float = 0.5) -> None:
    """CMA-ES (Hansen & Ostermeier 2001), the evolution strategy, on the knots `start` `[k]` that metagradient descent
    moves as well, and from the same place. width: standard deviation of its first generation, in log rates."""
    cma: Any = _package("cma", "searches by CMA-ES")
    record(schedules.from_knots(start, steps), "the start")
    # Its seed 0 means the time. It warns of a generation whose values are all equal, as they are where all diverge.
    options = {"seed": seed + 1, "verbose": -9, "tolflatfitness": math.inf}
    strategy = cma.CMAEvolutionStrategy(start.double().tolist(), width, options)
    generation = 0
    while record.left:
        generation += 1
        asked = strategy.ask()[: record.left]
        found = [
            record(schedules.from_knots(torch.tensor(x, dtype=start.dtype), steps), f"generation {generation}")
            for x in asked
        ]
        if len(found) == strategy.popsize:
            strategy.tell(asked, found)


def _package(name: str, purpose: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise MissingPackage(purpose, name, "recipes") from error
