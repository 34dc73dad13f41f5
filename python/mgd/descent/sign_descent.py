"""Sign descent on random coordinates, the outer optimizer of arXiv 2503.13751."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mgd.errors import BadArgument
from mgd.step.rng import seed_of


class SignDescent(torch.optim.Optimizer):
    """`x -= lr · sign(gradient)` on a random `share` of the coordinates, drawn anew at each step. The others stay.

    Coordinates whose gradient is 0 stay as well. The masks are a function of `seed` and of the step number, so a
    resumed descent draws the same masks as an uninterrupted one. If the entries of x are whole numbers and lr = 1, they
    stay whole numbers: the paper's update of the counts of training examples.

    shrinks: what `MetaDescent` halves after a training that diverged, "lr" or "share". Use "share" for whole numbers:
    a smaller step then moves fewer of the coordinates that the step before moved.

    Raises BadArgument unless lr is finite and > 0, and share is in (0, 1].
    """

    def __init__(self, params: Iterable[Tensor], lr: float, share: float = 1.0, seed: int = 0, shrinks: str = "lr"):
        if not 0 < lr < math.inf:
            raise BadArgument(f"expected a finite lr > 0; got {lr}")
        if not 0 < share <= 1:
            raise BadArgument(f"expected a share of the coordinates in (0, 1]; got {share}")
        if shrinks not in ("lr", "share"):
            raise BadArgument(f"expected shrinks to be 'lr' or 'share'; got {shrinks!r}")
        super().__init__(params, {"lr": lr, "share": share, "seed": seed, "shrinks": shrinks, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            generator = torch.Generator().manual_seed(seed_of(group["seed"], group["step"], number))
            group["step"] += 1  # in the group, so that `state_dict` holds it
            for x in group["params"]:
                # Drawn for every tensor, so that a tensor without a gradient does not change the masks of the others.
                mask = torch.rand(x.shape, generator=generator) < group["share"] if group["share"] < 1 else None
                if x.grad is None:
                    continue
                move = x.grad.sign()
                x.sub_(move if mask is None else move * mask.to(move), alpha=group["lr"])
        return loss
