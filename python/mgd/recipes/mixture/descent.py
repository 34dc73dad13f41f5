"""Descent on the shares of sources, for any training that draws its batches by them.

Batches are drawn from the current shares. A source's loss counts `share / share it was drawn with`, which is 1 in
value, and whose derivative is that of drawing more of it, in the mean over draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mgd.descent.descent import MetaDescent
from mgd.function import TrainingFunction

# A training whose batches are drawn by shares `[S]`, in an order of its own for every number, and whose loss reads
# z["mixture"] `[S]`.
Drawn = Callable[[Tensor, int], TrainingFunction]
FLOOR = 0.01  # the least share of a source: what is never drawn has no derivative that can be seen


@dataclass
class Path:
    """shares: `[S]` at the start of every meta-step, and after the last. values: the objective there."""

    shares: list[Tensor] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def found(self) -> Tensor:
        """The mean over the last quarter of the path, whose steps each have batches of their own."""
        return torch.stack(self.shares[-max(1, len(self.shares) // 4) :]).mean(0)


def shares_of(logits: Tensor) -> Tensor:
    """Shares `[S]` that sum to 1 and are at least `FLOOR`."""
    return FLOOR + (1 - len(logits) * FLOOR) * logits.softmax(0)


def weights_of(mixture: Tensor, drawn: Tensor, source: Tensor) -> Tensor:
    """What the loss of examples from these sources counts, where batches were drawn by the shares `drawn`."""
    return (mixture / drawn.to(mixture))[source]


def by_metagradient(make: Drawn, sources: int, meta_steps: int, outer: float, progress: bool = False) -> Path:
    """Adam on the logits of the shares, from equal ones."""
    path = Path()

    def problem(variables: dict[str, Tensor], meta_step: int) -> tuple[TrainingFunction, dict[str, Any]]:
        mixture = shares_of(variables["logits"])
        return make(mixture.detach(), meta_step), {"mixture": mixture}

    def observe(step: Any, result: Any, variables: dict[str, Tensor]) -> None:
        path.shares.append(shares_of(variables["logits"]).detach())
        path.values.append(step.value)

    descent = MetaDescent(problem, lambda variables: torch.optim.Adam(variables, lr=outer))
    found = descent.run({"logits": torch.zeros(sources)}, meta_steps, progress=progress, observe=observe)
    path.shares.append(shares_of(found.variables["logits"]).detach())
    return path


def by_forward_mode(make: Drawn, sources: int, meta_steps: int, outer: float, tick: Callable[[str], None]) -> Path:
    """The same descent, by derivatives with respect to all shares in one sweep forward."""
    path, logits = Path(), torch.zeros(sources, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=outer)
    for meta_step in range(meta_steps):
        mixture = shares_of(logits)
        value, gradient = effects(make(mixture.detach(), meta_step), mixture.detach())
        path.shares.append(mixture.detach())
        path.values.append(float(value))
        optimizer.zero_grad()
        mixture.backward(gradient)
        optimizer.step()
        tick("forward mode")
    path.shares.append(shares_of(logits).detach())
    return path


def effects(f: TrainingFunction, mixture: Tensor) -> tuple[Tensor, Tensor]:
    """The objective, `[]` or `[k]`, and its derivative with respect to every source's share, `[S]` or `[S, k]`: less
    that of the last source's, since shares sum to 1. So a sweep has one direction less than there are sources."""
    ways = torch.eye(len(mixture))
    result = f.jvp({"mixture": mixture}, [{"mixture": way - ways[-1]} for way in ways[:-1]])
    return result.value, torch.cat([result.tangent, torch.zeros_like(result.tangent[:1])])


def lattice(sources: int, parts: int) -> list[Tensor]:
    """All shares that are multiples of 1/parts: `(parts + sources - 1) choose parts` of them, with the floor."""
    found = []
    for bars in itertools.combinations(range(parts + sources - 1), sources - 1):
        ends = [-1, *bars, parts + sources - 1]
        counts = torch.tensor([b - a - 1 for a, b in itertools.pairwise(ends)], dtype=torch.float32)
        found.append(FLOOR + (1 - sources * FLOOR) * counts / parts)
    return found
