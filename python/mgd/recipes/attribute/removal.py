"""Counterfactual quality: what a query's loss does without the training examples that a method calls most helpful.

The linear datamodeling score asks how random subsets rank. This asks for the answer itself: the higher the loss rises,
the more the examples that were named had to do with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgd.errors import BadArgument
from mgd.recipes import intervals
from mgd.recipes.intervals import Interval


def most_helpful(scores: np.ndarray | Tensor, share: float) -> list[Tensor]:
    """For each query of `scores` `[k, n]`, the indices of the `round(share n)` examples with the lowest scores."""
    table = torch.as_tensor(np.asarray(scores))
    count = round(share * table.shape[1])
    if not 1 <= count < table.shape[1]:
        raise BadArgument(
            f"expected a share that removes at least 1 of {table.shape[1]} examples, and not all; got {share}"
        )
    return [row.sort().values for row in (-table).topk(count).indices]


def rises(task: Any, removed: list[Tensor], base: Tensor, tick: Any = lambda: None) -> Interval:
    """The mean over the queries of how much the loss of each, from `base` `[k]`, rises where it is trained without its
    own examples; and its 95% interval over the queries, of which there must be two."""
    changes = []
    for query, index in enumerate(removed):
        changes.append(float(task.without(index)[query] - base[query]))
        tick()
    return intervals.mean(changes)
