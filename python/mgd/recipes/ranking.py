"""How well a score ranks, without scikit-learn, which the demonstration can do without."""

from __future__ import annotations

import torch
from torch import Tensor


def auc(score: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half."""
    values, index = score.double().unique(return_inverse=True)
    counts = torch.bincount(index, minlength=len(values)).double()
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[index]
    p, n = int(positive.sum()), int((~positive).sum())
    if p == 0 or n == 0:
        return float("nan")
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n))
