"""What the trainings of several recipes share: seeded initial weights, batches in epochs, and a learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers in the block from this seed, and none of the caller's."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        yield


def epochs(n: int, batch: int, steps: int, generator: torch.Generator) -> Tensor:
    """Which of n examples each step sees, int64 `[steps, batch]`: one random order of them all after another."""
    count = -(-steps * batch // n)
    order = torch.cat([torch.randperm(n, generator=generator) for _ in range(count)])
    return order[: steps * batch].view(steps, batch)


def warm_up_cosine(steps: int, peak: float) -> Tensor:
    """A learning rate per step, float64 `[steps]`: linearly up over the first tenth, then down a half cosine."""
    t = torch.arange(steps, dtype=torch.float64)
    return peak * torch.minimum((t + 1) / max(1.0, 0.1 * steps), 0.5 * (1 + torch.cos(torch.pi * t / steps)))
