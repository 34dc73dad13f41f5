"""Sign descent on random coordinates, the outer optimizer of arXiv 2503.13751."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mgd.errors import BadArgument


class SignDescent(torch.optim.Optimizer):
    """`x -= lr · sign(gradient)` on a random `share` of the coordinates, drawn anew each step; the others stay.

    Coordinates whose gradient is 0 stay as well. The masks are a function of `seed` and of the number of the step, so
    that a descent that is resumed draws what an uninterrupted one draws. With whole numbers in x and lr = 1 they stay
    whole numbers: the paper's update of the counts of training examples.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, share: float = 1.0, seed: int = 0):
        if not lr > 0:
            raise BadArgument(f"expected lr > 0; got {lr}")
        if not 0 < share <= 1:
            raise BadArgument(f"expected a share of the coordinates in (0, 1]; got {share}")
        super().__init__(params, {"lr": lr, "share": share, "seed": seed, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            # A stream a group and step; Python's hash of integers is the same in every process.
            generator = torch.Generator().manual_seed(hash((group["seed"], number, group["step"])) & (2**63 - 1))
            group["step"] += 1
            for x in group["params"]:
                if x.grad is None:
                    continue
                move = x.grad.sign()
                if group["share"] < 1:
                    move = move * (torch.rand(x.shape, generator=generator) < group["share"]).to(move)
                x.sub_(move, alpha=group["lr"])
        return loss
