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
from mgd.results import Metagradient
from mgd.util.run_directory import RunDirectory

RANGE = (1e-6, 1.0)  # rates stay in it
PAIRS = 3  # timings of a training and a metagradient, alternating


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
        raise BadArgument("expected one training with directory=: of several, it would compare the first alone")

    def problem(variables: dict[str, Tensor], meta_step: int) -> tuple[TrainingFunction, dict[str, Tensor]]:
        own = functions[meta_step % len(functions)]
        return own, {"lr": schedules.from_knots(variables["log_lr"], len(own))}

    descent = MetaDescent(
        problem,
        lambda variables: torch.optim.Adam(variables, lr=outer, betas=(0.8, 0.95)),
        constraints={"log_lr": Box(math.log(RANGE[0]), math.log(RANGE[1]))},
        validate=_MeanOfLast(len(functions)) if len(functions) > 1 else None,
    )
    return descent.run({"log_lr": start}, meta_steps, directory=directory, progress=progress, observe=observe)


class _MeanOfLast:
    """The mean objective of the last trainings, one of each; infinity until each has had its turn."""

    def __init__(self, count: int):
        self._values: deque[float] = deque(maxlen=count)

    def __call__(self, result: Metagradient) -> float:
        self._values.append(float(result.value))
        full = len(self._values) == self._values.maxlen
        return statistics.fmean(self._values) if full else math.inf


def costs(function: TrainingFunction, z: dict[str, Tensor]) -> tuple[float, float, float]:
    """Seconds of a training with its objective; those of a metagradient in that unit; and, in that unit, what the
    first metagradient costs beyond the others, which is the trace of its graph."""
    begin = time.perf_counter()
    function.metagradient(z)
    first = time.perf_counter() - begin
    plain, full = [], []
    for _ in range(PAIRS):
        start = time.perf_counter()
        function.value(z)
        middle = time.perf_counter()
        function.metagradient(z)
        plain.append(middle - start)
        full.append(time.perf_counter() - middle)
    unit = statistics.median(plain)
    cost = statistics.median(full)
    return unit, cost / unit, max(0.0, first - cost) / unit


class Knots:
    """The knots of every meta-step, in memory and, if there is a directory, there."""

    def __init__(self, run: RunDirectory | None):
        self._run = run
        self.knots: dict[int, Tensor] = (run.read("knots") if run is not None else None) or {}

    def reached(self, step: int, knots: Tensor) -> None:
        self.knots[step] = knots
        if self._run is not None:
            self._run.write("knots", self.knots)
