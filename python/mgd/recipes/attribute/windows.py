"""Early and late: what do scores tell that come from a part of the training alone?

A score is a sum over the steps that read the example: what its weight does to that step's update, carried on to the end
of the training. The part of the last k steps is the derivative of a training that begins there (`since=k`), at their
share of the cost. What is left of the whole score is the part of the steps before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mgd.attribution.attribute import attribute
from mgd.errors import BadArgument
from mgd.recipes.attribute.lds import LDS
from mgd.recipes.attribute.retraining import timed
from mgd.recipes.attribute.task import Task
from mgd.ui.console import Reporter


@dataclass
class Window:
    """The part of the scores that comes from the steps `first` to `last - 1`.

    scores: float64 `[k, n]`. size: their norm in units of that of the whole scores. seconds: of the attribution; None
    where they are a difference of two others. lds: by share of examples dropped.
    """

    name: str
    first: int
    last: int
    scores: np.ndarray
    size: float
    seconds: float | None
    lds: dict[float, LDS] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        lds = {str(p): score.to_dict() for p, score in self.lds.items()}
        facts = {"name": self.name, "steps": [self.first, self.last], "size": self.size, "seconds": self.seconds}
        return facts | {"lds": lds}


def last_steps(share: float, steps: int) -> int:
    """How many steps the last `share` of a training has. Raises BadArgument unless that is some of them, not all."""
    count = round(share * steps)
    if not 1 <= count < steps:
        raise BadArgument(f"expected windows of some of the {steps} last steps, and not all; got a share of {share:g}")
    return count


def windows(
    task: Task, whole: np.ndarray, shares: Sequence[float], chunk: int | None, reporter: Reporter
) -> list[Window]:
    """The scores from the last steps alone, for each share of them, and from the steps before. whole: those from all
    steps, `[k, n]`. chunk: as of `attribute`."""
    steps, whole = len(task.function), np.asarray(whole, np.float64)
    late: list[Window] = []
    early: list[Window] = []
    for share in sorted(shares):
        count = last_steps(share, steps)
        f = task.function.replaced(since=count)
        with reporter.phase("windows", f"attributing to the last {count} steps alone"):
            found, seconds = timed(lambda f=f: attribute(f, task.z, task.queries, task.objectives, chunk=chunk))  # type: ignore[misc]
        end = np.asarray(found.scores, np.float64)
        late.append(_window(f"the last {count} steps", (steps - count, steps), end, whole, seconds))
        early.append(_window(f"the first {steps - count} steps", (0, steps - count), whole - end, whole, None))
    return [*late, *reversed(early)]


def _window(name: str, steps: tuple[int, int], scores: np.ndarray, whole: np.ndarray, seconds: float | None) -> Window:
    return Window(name, *steps, scores, float(np.linalg.norm(scores) / np.linalg.norm(whole)), seconds)
