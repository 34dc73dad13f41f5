"""What the peers share: segments, and models whose batch norms keep no running statistics."""

from __future__ import annotations

from math import isqrt

from torch import nn
from torch.func import replace_all_batch_norm_modules_


def segment_length(steps: int) -> int:
    """The divisor of `steps` that is nearest to its root: how many steps a checkpoint spans."""
    return min((n for n in range(1, steps + 1) if steps % n == 0), key=lambda n: (abs(n - isqrt(steps)), n))


def without_statistics(model: nn.Module) -> nn.Module:
    """The model, changed: batch norms that do not write running statistics, which no functional transform allows.
    A training and an objective in training mode do not read them."""
    return replace_all_batch_norm_modules_(model)
