"""Small runs in directories: a descent, a rater, an attribution and a search, each of a fraction of a second."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import mgd
from mgd.attribution import scores
from mgd.errors import KernelError, MetagradientError
from mgd.recipes.lr_schedule.search import Objective
from mgd.util import files
from mgd.util.run_directory import RunDirectory
from mgd_kernels import SGD, Store

torch.set_num_threads(1)

STEPS, EXAMPLES, QUERIES = 3, 6, 5


def training(**changes: Any) -> mgd.TrainingFunction:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = torch.randn(EXAMPLES, 3, generator=generator, dtype=torch.float64)
    batches = [(x[i], i) for i in torch.randperm(EXAMPLES, generator=generator).split(2)]

    def loss(model, batch, z):
        return (z["weights"][batch[1]] * model(batch[0])[:, 0].square()).sum()

    options = {
        "model": nn.Linear(3, 1, dtype=torch.float64),
        "loss": loss,
        "batches": batches,
        "optimizer": SGD(lr=0.1, momentum=0.5),
        "objective": lambda model: model(x).square().mean(),
        "trace": False,
    }
    return mgd.TrainingFunction(**options | changes)


WEIGHTS = {"weights": torch.linspace(0.5, 1.5, EXAMPLES, dtype=torch.float64)}


def descent(directory: Path, end: int = 4) -> list[Any]:
    """`end`: how many steps are taken."""
    outer = lambda x: torch.optim.Adam(x, lr=0.1)
    found = mgd.MetaDescent(training(), outer, validate=lambda result: -float(result.value)).run(
        WEIGHTS, end, directory=directory
    )
    return [found.values, found.best["weights"].tolist(), found.variables["weights"].tolist(), found.best_step]


class Rater(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x):
        return self.layer(x)[:, 0]


def rater(directory: Path, end: int = 4) -> list[Any]:
    pool = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    found = mgd.DataRater(
        Rater(),
        lambda: nn.Linear(3, 1),
        lambda model, x: (model(x)[:, 0] - x.sum(1)).square(),
        pool,
        pool[:7],
        optimizer=SGD(lr=0.1, momentum=0.5),
        batch=4,
        population=2,
        lifetime=3,
        lr=0.1,
        options={"trace": False},
    ).fit(end, directory=directory, save_every=1)
    return [[step.values for step in found.history], found.rate(pool).tolist()]


class Enough(Exception):
    """The run is left where it is."""


def attribution(directory: Path, end: int = QUERIES, first: int = QUERIES, **options: Any) -> list[Any]:
    """first: how many queries are asked for before those of the first chunk."""
    points = torch.randn(QUERIES, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    asked = 0

    def objectives(model, index):
        nonlocal asked
        asked += 1
        if asked > first + end:
            raise Enough
        return model(points[index])[:, 0].square()

    try:
        mgd.attribute(
            training(), WEIGHTS, QUERIES, objectives, weights="weights", names=list("abcde"), chunk=1, out=directory,
            **options,
        )  # fmt: skip
    except Enough:
        return []
    return loaded(directory)


def loaded(directory: Path) -> list[Any]:
    found = mgd.Attribution.load(directory)
    assert isinstance(found.scores, np.memmap)
    visits = None if found.visits is None else found.visits.tolist()
    facts = [found.scores.tolist(), found.values.tolist(), found.weights.tolist(), visits, found.queries, found.names]
    estimate = None if found.estimate is None else found.estimate.to_dict()
    return [*facts, found.report.steps, found.report.unvisited, estimate]


def estimate(directory: Path, end: int = 4) -> list[Any]:
    """Of scores from as many combined sweeps as the gradients have rank. `end`: how many sweeps are made, of four."""
    asked = end * QUERIES if end < 4 else 10**9  # each sweep asks for every query
    return attribution(directory, asked, 2 * QUERIES, combine=4)


def search(directory: Path, end: int = 6) -> list[Any]:
    function = training(loss=lambda model, batch, z: model(batch[0]).square().sum())
    rates = lambda i: torch.full((STEPS,), 0.01 * (i + 1))
    with RunDirectory(directory, "search", function.identity({"lr": rates(0)})) as run:
        objective = Objective(function, run)
        return [objective(rates(i)) for i in range(end)]


RUNS: dict[str, Callable[..., list[Any]]] = {
    "descent": descent,
    "rater": rater,
    "attribution": attribution,
    "estimate": estimate,
    "search": search,
}


def outcome(run: Callable[..., list[Any]], directory: Path, right: list[Any]) -> str:
    """What comes of a run: "right", "wrong", the name of an error of this package, or "raw" and what it was."""
    try:
        return "right" if run(directory) == right else "wrong"
    except (KernelError, MetagradientError) as error:
        return type(error).__name__
    except Exception as error:
        return f"raw {type(error).__name__}: {error}"


def killed_at(kind: str, directory: str, number: int) -> None:
    """Run, in a process of its own that is killed before the given call of those that change the directory."""
    calls = 0

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for owner, names in {
        os: ("replace", "fsync", "pwrite", "unlink", "open"),
        Store: ("put", "flush", "close"),
    }.items():
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))
    assert files.os is os and scores.os is os
    RUNS[kind](Path(directory))


def killed_after(kind: str, directory: str, seconds: float) -> None:
    """Run, in a process of its own that is killed after a time."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    RUNS[kind](Path(directory))
