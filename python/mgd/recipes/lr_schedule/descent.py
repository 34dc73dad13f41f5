"""Metagradient descent on the learning-rate schedule of any training, and what its meta-steps cost."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mgd import schedules
from mgd.descent.constraints import Box
from mgd.descent.descent import Descent, MetaDescent
from mgd.descent.state import MetaStep
from mgd.errors import BadArgument
from mgd.function import TrainingFunction
from mgd.recipes.lr_schedule.trainings import Numbered
from mgd.results import Metagradient
from mgd.util.run_directory import RunDirectory

RANGE = (1e-6, 1.0)  # rates stay in it
WITHIN = Box(math.log(RANGE[0]), math.log(RANGE[1]))
BETAS = (0.8, 0.95)  # of Adam: few meta-steps are worth remembering
SLOWING = 8  # meta-steps after which the outer rate has fallen by the square root of 2
PAIRS = 7  # timings of a training and a metagradient, alternating


def descend_on_schedule(
    function: TrainingFunction | Sequence[TrainingFunction],
    start: Tensor,
    meta_steps: int,
    *,
    outer: float = 0.1,
    directory: str | os.PathLike[str] | None = None,
    progress: bool = False,
    observe: Callable[[MetaStep, Any, dict[str, Tensor]], None] | None = None,
) -> Descent:
    """Descend on the knots `start` `[k]`, logarithms of learning rates, of any training; they are interpolated
    (`mgd.schedules.from_knots`; k = T sets every step). The knots found are `.best["log_lr"]`.

    function: or several of one length, such as trainings from other initial weights in other orders. They take turns, a
        meta-step each, and Adam's momentum averages them: what is found is for their mean, rather than for one of
        them. The history has the objective of the training whose turn it was, and `.best` the variables at the lowest
        mean over a round of them.
    outer: Adam's learning rate; no knot moves by much more in a meta-step, so that 0.1 is about a tenth of the rate.
    """

    functions = [function] if isinstance(function, TrainingFunction) else list(function)
    if len({len(each) for each in functions}) != 1:
        raise BadArgument(f"expected trainings of one length; got {[len(each) for each in functions]} steps")
    if directory is not None and len(functions) > 1:
        raise BadArgument(
            "expected one training with directory=: of several, the mean that finds the best is not kept there"
        )

    def problem(variables: dict[str, Tensor], meta_step: int) -> tuple[TrainingFunction, dict[str, Tensor]]:
        own = functions[meta_step % len(functions)]
        return own, {"lr": schedules.from_knots(variables["log_lr"], len(own))}

    descent = MetaDescent(
        problem,
        lambda variables: torch.optim.Adam(variables, lr=outer, betas=BETAS),
        constraints={"log_lr": WITHIN},
        validate=_MeanOfLast(len(functions)) if len(functions) > 1 else None,
    )
    return descent.run({"log_lr": start}, meta_steps, directory=directory, progress=progress, observe=observe)


def descend_on_numbered(
    trainings: Numbered,
    start: Tensor,
    meta_steps: int,
    *,
    outer: float = 0.15,
    directory: str | os.PathLike[str] | None = None,
    progress: bool = False,
    observe: Callable[[MetaStep, Any, dict[str, Tensor]], None] | None = None,
) -> Descent:
    """`descend_on_schedule` for the mean over a family of trainings: meta-step i trains `trainings(i)`, so that no
    chance of one training is followed twice. What is found is not `.best`, whose training was an easy one, but
    `KnotPath.answer`.

    outer: Adam's learning rate at the first meta-step; it falls with the square root of their number.
    directory: as of `MetaDescent.run`, which compares the trainings of all meta-steps that are done.
    """

    def problem(variables: dict[str, Tensor], meta_step: int) -> tuple[TrainingFunction, dict[str, Any]]:
        function, z = trainings(meta_step)
        return function, z | {"lr": schedules.from_knots(variables["log_lr"], len(function))}

    descent = MetaDescent(
        problem, lambda variables: SlowingAdam(variables, lr=outer, betas=BETAS), constraints={"log_lr": WITHIN}
    )
    return descent.run({"log_lr": start}, meta_steps, directory=directory, progress=progress, observe=observe)


class SlowingAdam(torch.optim.Adam):
    """Adam whose learning rate at step i, from 0, is `lr / sqrt(1 + i / SLOWING)`: averages noise, whatever the number
    of steps will be."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            taken = max((int(self.state[x].get("step", 0)) for x in group["params"] if x in self.state), default=0)
            group["lr"] /= math.sqrt(1 + taken / SLOWING)
        try:
            return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


class _MeanOfLast:
    """The mean objective of the last trainings, one of each; infinity until each has had its turn."""

    def __init__(self, count: int):
        self._values: deque[float] = deque(maxlen=count)

    def __call__(self, result: Metagradient) -> float:
        self._values.append(float(result.value))
        full = len(self._values) == self._values.maxlen
        return statistics.fmean(self._values) if full else math.inf


def costs(trainings: Numbered, rates: Tensor) -> tuple[float, float, float]:
    """Seconds of a training at these rates with its objective; those of a metagradient in that unit; and, in that unit,
    what the first metagradient costs beyond the others, which is the trace of its graph."""
    begin = time.perf_counter()
    function, z = trainings(0)
    function.metagradient(z | {"lr": rates})
    first = time.perf_counter() - begin
    plain, full = [], []
    for number in range(1, PAIRS + 1):
        start = time.perf_counter()
        function, z = trainings(number)
        function.value(z | {"lr": rates})
        middle = time.perf_counter()
        function, z = trainings(number)
        function.metagradient(z | {"lr": rates})
        plain.append(middle - start)
        full.append(time.perf_counter() - middle)
    unit = statistics.median(plain)
    ratio = statistics.median(b / a for a, b in zip(plain, full, strict=True))
    return unit, ratio, max(0.0, first / unit - ratio)


class KnotPath:
    """Variables `log_lr` of every meta-step, in memory and, if there is a run, in its directory. Pass `observe`."""

    def __init__(self, run: RunDirectory | None = None):
        self._run = run
        self.knots: dict[int, Tensor] = (run.read("knots") if run is not None else None) or {}

    def observe(self, step: MetaStep, result: Metagradient, variables: dict[str, Tensor]) -> None:
        self.knots[step.step] = variables["log_lr"]
        if self._run is not None:
            self._run.write("knots", self.knots)

    def answer(self, until: int) -> Tensor:
        """The knots that a descent on trainings by number hands in after meta-step `until`: the mean of the last
        quarter of them, since each followed one training, and its noise."""
        first = until - (until + 1) // 4 + 1 if until > 2 else until
        return torch.stack([self.knots[i] for i in range(first, until + 1)]).mean(0)
