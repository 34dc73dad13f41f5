"""From a selection problem to counts of its examples, by metagradient descent."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mgd.descent.constraints import Box
from mgd.descent.descent import Descent, MetaDescent
from mgd.descent.sign_descent import SignDescent
from mgd.descent.state import MetaStep
from mgd.errors import BadArgument
from mgd.function import TrainingFunction
from mgd.recipes.select.exchange import Exchange
from mgd.recipes.select.problem import WEIGHTS, SelectionProblem
from mgd.results import Metagradient
from mgd.step.rng import seed_of

Observe = Callable[[MetaStep, Metagradient, Tensor], None]


@dataclass
class Selection:
    """counts: float `[n]` of whole numbers, those of the lowest objective. last: where the descent ended. descent: its
    history, and in `notes` the trainings that diverged, with their step, and what was done about them."""

    counts: Tensor
    last: Tensor
    descent: Descent

    @property
    def kept(self) -> Tensor:
        """Indices of the examples that are used at all."""
        return self.counts.nonzero()[:, 0]


def select(
    problem: SelectionProblem,
    meta_steps: int,
    *,
    budget: int | None = None,
    counts: Tensor | None = None,
    share: float = 0.05,
    highest: int | None = None,
    shard: int | None = None,
    memory: float = 0.0,
    patience: int | None = None,
    directory: str | os.PathLike[str] | None = None,
    seed: int = 0,
    observe: Observe | None = None,
    progress: bool = False,
) -> Selection:
    """Train `meta_steps` times, each time with the metagradient of the candidates, and change the counts by it.

    Without a budget: the paper's update. Each candidate's count goes up or down by one, against the sign of its
    metagradient, with probability `share`, and stays in 0..`highest`. With a budget: the counts sum to `budget`, and of
    the candidates the worst kept are exchanged for the best left out, at most `share` of them (see `Exchange`, also
    for `memory`).

    counts: where to begin; by default 1 each, or with a budget 1 for as many examples drawn at random.
    share: large shares change many examples by the same information; all of a class may then come and go together.
    highest: by default no limit without a budget, and 1 with one.
    shard: how many examples, drawn anew at every meta-step, are its candidates; by default the whole pool. A step's
        memory and time grow with it.
    patience, directory: of `MetaDescent.run`. observe: called after each training with the counts that it used.

    A training that diverges is noted with its step; the last change of the counts is taken again with half the share.
    """
    n = len(problem)
    start = _start(n, budget, counts, highest, seed)
    if shard is not None and not 1 <= shard <= n:
        raise BadArgument(f"expected a shard of 1..{n} candidates, the size of the pool; got {shard}")
    box = Box(0, highest)
    box.check("counts", start)

    def training(variables: Mapping[str, Tensor], step: int) -> tuple[TrainingFunction, dict[str, Tensor]]:
        c = variables["counts"]
        if not bool((c >= 0.5).any()):
            raise BadArgument(
                f"meta-step {step}: every example of the pool has been dropped; take a smaller share, or a budget"
            )
        stream = seed_of(seed, step)
        candidates = torch.arange(n)
        if shard is not None:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(stream))
            candidates = order[:shard].sort().values
        problem.prepare(c.detach(), stream, candidates)
        # Zero, and as far as derivatives go the counts of the candidates.
        return problem.function, {WEIGHTS: (c - c.detach())[candidates].to(problem.device)}

    def outer(x: list[Tensor]) -> torch.optim.Optimizer:
        if budget is None:
            return SignDescent(x, lr=1, share=share, seed=seed, shrinks="share")
        return Exchange(x, share, highest or 1, memory)

    def told(step: MetaStep, result: Metagradient, variables: Mapping[str, Tensor]) -> None:
        if observe is not None:
            observe(step, result, variables["counts"])

    descent = MetaDescent(training, outer, constraints={"counts": box}).run(
        {"counts": start}, meta_steps, patience=patience, directory=directory, observe=told, progress=progress
    )
    return Selection(descent.best["counts"], descent.variables["counts"], descent)


def _start(n: int, budget: int | None, counts: Tensor | None, highest: int | None, seed: int) -> Tensor:
    """The counts to begin with, float `[n]`. Raises where no counts are allowed."""
    if highest is not None and highest < 1:
        raise BadArgument(f"no counts but 0 are in 0..{highest}: expected the highest count to be at least 1")
    if budget is not None and not 1 <= budget <= n * (highest or 1):
        raise BadArgument(
            f"expected a budget of 1..{n * (highest or 1)}: the pool has {n} examples, each used at most "
            f"{highest or 1} time(s); got {budget}"
        )
    if counts is None:
        if budget is None:
            return torch.ones(n)
        # Whole rounds over the pool, and a part of it at random.
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        return (budget // n + (order < budget % n)).float()
    if counts.shape != (n,):
        raise BadArgument(f"expected a count for each of the {n} examples; got a tensor {list(counts.shape)}")
    counts = counts.detach().float()
    if bool((counts < 0).any()) or not torch.equal(counts, counts.round()):
        raise BadArgument("expected counts that are whole numbers and not negative")
    if highest is not None and float(counts.max()) > highest:
        raise BadArgument(f"expected counts of at most {highest}; got {int(counts.max())}")
    if budget is not None and int(counts.sum()) > budget:
        raise BadArgument(f"expected counts that sum to at most the budget of {budget}; got {int(counts.sum())}")
    return counts
