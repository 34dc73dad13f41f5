"""What schedules are worth on test images, after trainings on which none of them was sought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mgd.errors import NonFiniteState
from mgd.recipes import intervals
from mgd.recipes.intervals import Interval
from mgd.recipes.lr_schedule.trainings import Numbered
from mgd.recipes.small_images import Task
from mgd.ui.console import Reporter


@dataclass
class Judged:
    """A schedule on the test images. loss, accuracy: after each training; infinity and 0 where it diverges.

    more: how much more the loss is than the reference schedule's after the same trainings, with its interval over
    them; None for the reference, and where a training diverged.
    """

    loss: list[float]
    accuracy: list[float]
    more: Interval | None = None

    @property
    def mean(self) -> float:
        return float(np.mean(self.loss))


def judge(
    task: Task,
    trainings: Numbered,
    numbers: Sequence[int],
    schedules: Mapping[str, Tensor],
    reference: str,
    reporter: Reporter,
) -> dict[str, Judged]:
    """Test loss and accuracy of schedules `[T]` after the trainings of these numbers."""
    judged = {name: Judged([], []) for name in schedules}
    with reporter.bar("judging", len(numbers) * len(schedules)) as tick:
        for number in numbers:
            function, z = trainings(number)
            for name, rates in schedules.items():
                try:
                    loss, right = task.judge(function, z | {"lr": rates})
                    judged[name].loss.append(float(loss.double().mean()))
                    judged[name].accuracy.append(float(right.double().mean()))
                except NonFiniteState:
                    judged[name].loss.append(np.inf)
                    judged[name].accuracy.append(0.0)
                tick(name)
    for name, entry in judged.items():
        pair = np.array([entry.loss, judged[reference].loss])
        if name != reference and len(numbers) > 1 and np.isfinite(pair).all():
            entry.more = intervals.mean(pair[0] - pair[1])
    return judged
