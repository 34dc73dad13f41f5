"""What schedules are worth on test images, after the training they were sought on and after others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mgd.function import TrainingFunction
from mgd.recipes import intervals
from mgd.recipes.intervals import Interval
from mgd.recipes.small_images import Task
from mgd.ui.console import Reporter


@dataclass
class Judged:
    """A schedule on the test images. loss, accuracy: after each training, the one it was sought on first.

    here, elsewhere: how much more the loss is than the reference schedule's; after the training it was sought on, with
    an interval over test images, and after the others, with one over trainings.
    """

    loss: list[float]
    accuracy: list[float]
    here: Interval | None = None
    elsewhere: Interval | None = None


def judge(
    task: Task,
    functions: Callable[[int], TrainingFunction],
    trainings: int,
    schedules: Mapping[str, Tensor],
    reference: str,
    reporter: Reporter,
) -> dict[str, Judged]:
    """Test loss and accuracy of schedules `[T]`, after `functions(0)` that they were sought on, and `functions(1)` to
    `functions(trainings - 1)`."""
    losses: dict[str, np.ndarray] = {}  # of every test image after the first training
    judged = {name: Judged([], []) for name in schedules}
    with reporter.bar("judging", trainings * len(schedules)) as tick:
        for number in range(trainings):
            function = functions(number)
            for name, rates in schedules.items():
                loss, right = task.judge(function, {"lr": rates})
                losses.setdefault(name, loss.double().numpy())
                judged[name].loss.append(float(loss.double().mean()))
                judged[name].accuracy.append(float(right.double().mean()))
                tick(name)
    for name, entry in judged.items():
        if name == reference:
            continue
        entry.here = intervals.mean(losses[name] - losses[reference])
        if trainings > 2:
            entry.elsewhere = intervals.mean(np.array(entry.loss[1:]) - np.array(judged[reference].loss[1:]))
    return judged
