"""The trainings that judge an attribution: with all examples, and again without some of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mgd.recipes.attribute.task import Task
from mgd.results import Trained
from mgd.ui.console import Reporter


def timed(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[Any, float]:
    """What `work` returns, and the seconds that it took."""
    start = clock()
    return work(), clock() - start


def trained(task: Task, reporter: Reporter, clock: Callable[[], float] = time.perf_counter) -> tuple[Trained, float]:
    """The training with all examples, and its seconds, the fewer of two."""
    f, z = task.function, task.z
    f.replaced(batches=f.batches[:2]).train({**z, "lr": z["lr"][:2]})  # the first calls of torch are slower
    with reporter.phase("training", f"{task.name}: training on {len(task):,} examples of {task.data}"):
        both = [timed(lambda: f.train(z), clock) for _ in range(2)]
    return both[0][0], min(seconds for _, seconds in both)


def retrained(
    task: Task, dropped: Mapping[float, list[Tensor]], base: Tensor, reporter: Reporter
) -> dict[float, Tensor]:
    """fraction -> float64 `[m, k]`: how the queries' losses, `base` `[k]`, change without each of its m subsets."""
    total = sum(map(len, dropped.values()))
    found = {}
    with (
        reporter.phase("retraining", f"training {total} times without some of the examples"),
        reporter.bar("retraining", total) as tick,
    ):
        for fraction, sets in dropped.items():
            changes = []
            for index in sets:
                changes.append(task.without(index) - base)
                tick(f"without {fraction:.0%}")
            found[fraction] = torch.stack(changes)
    return found
