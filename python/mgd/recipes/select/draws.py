"""Batches drawn by whole-number counts of the training examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mgd.errors import BadArgument
from mgd.recipes.trainings import epochs


def draw(counts: Tensor, steps: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Which examples the steps see, int64 `[steps, batch_size]`: epochs in random order, in each of which example i
    comes `counts[i]` times. The number of steps does not depend on the counts: every selection trains equally long."""
    members = torch.arange(len(counts)).repeat_interleave(counts.round().long())
    if len(members) == 0:
        raise BadArgument("the counts leave no example to train on")
    return members[epochs(len(members), batch_size, steps, generator)]


class Draws(Sequence[Any]):
    """The batches of a training by counts, and the candidates, which step `at` sees beside its batch.

    pool: a pytree of tensors with a first dimension of n examples. A batch is a mapping with "examples" (a slice of the
    pool) and, at step `at`, "candidates" (another). What they hold is set by `set` and stays until it is called again,
    so that one `TrainingFunction`, whose traced graphs are made once, serves every set of counts.
    """

    def __init__(self, pool: Any, steps: int, batch_size: int, at: int):
        self.pool, self.steps, self.batch_size, self.at = pool, steps, batch_size, at
        self.order = torch.zeros(steps, batch_size, dtype=torch.int64)
        self.candidates: Tensor | None = None

    def set(self, counts: Tensor, seed: int, candidates: Tensor | None = None) -> None:
        """Draw the order of the examples by `counts` `[n]` and `seed`. candidates: indices `[m]`. Both go where the
        pool is, once."""
        device = tree_leaves(self.pool)[0].device
        self.order = draw(counts.cpu(), self.steps, self.batch_size, torch.Generator().manual_seed(seed)).to(device)
        self.candidates = None if candidates is None else candidates.to(device)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, t: Any) -> Any:
        batch = {"examples": slice_of(self.pool, self.order[t])}
        if t == self.at and self.candidates is not None:
            batch["candidates"] = slice_of(self.pool, self.candidates)
        return batch


def slice_of(pool: Any, index: Tensor) -> Any:
    """The examples of the pool with these indices."""
    return tree_map(lambda x: x[index.to(x.device)], pool)
