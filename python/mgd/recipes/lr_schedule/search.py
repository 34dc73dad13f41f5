"""Searches for learning-rate schedules without gradients: a grid, Optuna's TPE, and CMA-ES.

A `Record` is what a search asks for values of an `Objective`, and what it leaves behind. A training that diverges is
infinitely bad.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mgd import schedules
from mgd.errors import BadArgument, MissingPackage, NonFiniteState
from mgd.function import TrainingFunction
from mgd.recipes.lr_schedule.trainings import Numbered
from mgd.util.fingerprint import digest
from mgd.util.run_directory import RunDirectory

KINDS = ("one-cycle", "linear", "cosine")
PEAKS, PARTS = (1e-2, 1.0), (1e-2, 1.0)  # ranges of the peak, and of start and end as parts of it; both logarithmic
FACTORS = (1e-3, 1.0)  # range of what TPE multiplies the rates of marked steps by, logarithmic


class Objective:
    """The objective after a training with these learning rates `[T]`; infinity where the training diverges.

    function: or a `Numbered`; the objective is then the mean over its trainings of these `numbers`.
    run: keeps every value, so that a search that is run again does not train again.
    seconds: of the trainings that were run.
    """

    def __init__(
        self, function: TrainingFunction | Numbered, run: RunDirectory | None = None, numbers: Sequence[int] = (0,)
    ):
        self.function, self._run, self._numbers = function, run, tuple(numbers)
        self.seconds: list[float] = []
        self._known: dict[str, float] = (run.read("values") if run is not None else None) or {}

    def of(self, numbers: Sequence[int]) -> Objective:
        """The same over other trainings; it knows the same values."""
        other = Objective(self.function, None, numbers)
        other._run, other.seconds, other._known = self._run, self.seconds, self._known
        return other

    def __call__(self, rates: Tensor) -> float:
        key = digest(rates)
        return sum(self._value(rates, number, f"{key} {number}") for number in self._numbers) / len(self._numbers)

    def _value(self, rates: Tensor, number: int, key: str) -> float:
        if key not in self._known:
            start = time.perf_counter()
            own = self.function
            function, z = (own, {}) if isinstance(own, TrainingFunction) else own(number)
            try:
                value = float(function.value(z | {"lr": rates.detach()}))
            except NonFiniteState:
                value = math.inf
            self.seconds.append(time.perf_counter() - start)
            self._known[key] = value
            if self._run is not None:
                self._run.write("values", self._known)
        return self._known[key]


@dataclass
class Record:
    """The trainings of one search. budget: in trainings. cost: trainings that a value takes. values: as they came.
    spent: training-equivalents after each. answers: what the search would have handed in, each with what was spent by
    then, and words that say what it is."""

    name: str
    objective: Callable[[Tensor], float]
    budget: int
    tick: Callable[[str], None] = lambda note: None
    cost: int = 1
    values: list[float] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)
    answers: list[tuple[float, Tensor, str]] = field(default_factory=list)

    @property
    def left(self) -> int:
        """How many more values the budget pays for."""
        return self.budget // self.cost - len(self.values)

    @property
    def lowest(self) -> float:
        return min(self.values, default=math.inf)

    @property
    def best(self) -> Tensor:
        return self.answers[-1][1]

    @property
    def words(self) -> str:
        return self.answers[-1][2]

    def __call__(self, rates: Tensor, words: str) -> float:
        """The value of these rates, which are the answer if none was lower."""
        first, lowest = not self.values, self.lowest
        value = self.add(self.objective(rates), self.cost)
        if first or value < lowest:
            self.answer(rates, words)
        return value

    def add(self, value: float, cost: float) -> float:
        """A value that was paid for elsewhere, at this cost in training-equivalents."""
        self.values.append(value)
        self.spent.append((self.spent[-1] if self.spent else 0.0) + cost)
        self.tick(f"{self.name}, lowest {self.lowest:.4f}")
        return value

    def answer(self, rates: Tensor, words: str) -> None:
        self.answers.append((self.spent[-1] if self.spent else 0.0, rates.detach().clone(), words))

    def answer_within(self, budget: float) -> Tensor | None:
        """The answer at this many training-equivalents, None if there was none yet."""
        return next((rates for spent, rates, _ in reversed(self.answers) if spent <= budget), None)


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


def shapes(count: int, peaks: tuple[float, float] = PEAKS) -> Iterator[Shape]:
    """A grid of 20 shapes per peak: one-cycle and linear with three starts and three ends each, cosine with two ends.
    The peaks, `count`, are evenly spaced between the logarithms of `peaks`; 10 of them make a grid of 200."""
    low, high = map(math.log, peaks)
    for i in range(count):
        peak = math.exp(low + (high - low) * (i + 0.5) / count)
        for kind, start, end in itertools.product(KINDS[:2], (0.03, 0.2, 1.0), (0.01, 0.1, 0.5)):
            yield Shape(kind, peak, start, end)
        for end in (0.01, 0.1):
            yield Shape("cosine", peak, 1.0, end)


def grid(record: Record, steps: int, peaks: tuple[float, float] = PEAKS) -> None:
    """As many of the grid's shapes as the budget pays for, which is a multiple of 20."""
    if record.left < 20 or record.left % 20:
        raise BadArgument(f"expected a budget for a multiple of 20, the shapes of one peak; got one for {record.left}")
    for shape in shapes(record.left // 20, peaks):
        record(shape.rates(steps), str(shape))


def tpe(
    record: Record, steps: int, seed: int, peaks: tuple[float, float] = PEAKS, marked: Tensor | None = None
) -> None:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) over shapes, from the same ranges as the grid's.

    marked: bool `[T]`, steps whose rates one more number multiplies, from `FACTORS`.
    """
    optuna: Any = _package("optuna", "searches by TPE")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    while record.left:
        trial = study.ask()
        shape = Shape(
            trial.suggest_categorical("kind", KINDS),
            trial.suggest_float("peak", *peaks, log=True),
            trial.suggest_float("start", *PARTS, log=True),
            trial.suggest_float("end", *PARTS, log=True),
        )
        rates, words = shape.rates(steps), str(shape)
        if marked is not None:
            factor = trial.suggest_float("factor", *FACTORS, log=True)
            rates, words = torch.where(marked, factor * rates, rates), f"{words}; {factor:.2g} of it at marked steps"
        study.tell(trial, record(rates, words))


def cma_es(
    record: Record,
    steps: int,
    start: Tensor,
    seed: int,
    width: float = 0.5,
    fresh: Callable[[int], Callable[[Tensor], float]] | None = None,
) -> None:
    """CMA-ES (Hansen & Ostermeier 2001), the evolution strategy, on the knots `start` `[k]` that metagradient descent
    moves as well, and from the same place. width: standard deviation of its first generation, in log rates.

    fresh: the objective of a generation, from its number, such as the mean over other trainings each time. Values of
    different generations cannot be compared then: the answer is the mean of the strategy, not the lowest.
    """
    cma: Any = _package("cma", "searches by CMA-ES")
    if fresh is None:
        record(schedules.from_knots(start, steps), "the start")
    else:
        record.answer(schedules.from_knots(start, steps), "the start")
    # Its seed 0 means the time. It warns of a generation whose values are all equal, as they are where all diverge.
    options = {"seed": seed + 1, "verbose": -9, "tolflatfitness": math.inf}
    strategy = cma.CMAEvolutionStrategy(start.double().tolist(), width, options)
    generation = 0
    while record.left:
        generation += 1
        if fresh is not None:
            record.objective = fresh(generation)
        asked, found = strategy.ask()[: record.left], []
        for x in asked:
            rates = schedules.from_knots(torch.tensor(x, dtype=start.dtype), steps)
            if fresh is None:
                found.append(record(rates, f"generation {generation}"))
            else:
                found.append(record.add(record.objective(rates), record.cost))
        if len(found) == strategy.popsize:
            strategy.tell(asked, found)
            if fresh is not None:
                mean = torch.tensor(strategy.mean, dtype=start.dtype)
                record.answer(schedules.from_knots(mean, steps), f"the mean after generation {generation}")


def _package(name: str, purpose: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise MissingPackage(purpose, name, "recipes") from error
