"""Adam for gradients from several sources at once, each normalised by its own moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mgd.errors import BadArgument


class PopulationAdam:
    """The mean of the Adam updates (arXiv 1412.6980) for `members` gradients of the same parameters.

    Meta-gradients of young and old inner models differ in scale by orders of magnitude, so the largest would dominate
    their plain average. Here each member has its own Adam, and the updates are averaged (arXiv 2505.17895).

    Raises BadArgument unless lr > 0 and the betas are in [0, 1).
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        members: int,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        if lr <= 0 or not all(0 <= beta < 1 for beta in betas):
            raise BadArgument(f"expected lr > 0 and betas in [0, 1); got lr={lr} and betas={betas}")
        self.parameters = list(parameters)
        self.lr, self.betas, self.eps = lr, betas, eps
        flat = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        self.mean, self.square = (flat.new_zeros(members, flat.numel()) for _ in range(2))
        self.counts = [0] * members

    @torch.no_grad()
    def step(self, gradients: Sequence[Sequence[Tensor] | None]) -> None:
        """Update the parameters in place. gradients: per member, tensors like the parameters; None for no gradient."""
        total, present = torch.zeros_like(self.mean[0]), 0
        beta1, beta2 = self.betas
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            flat = torch.cat([g.reshape(-1) for g in gradient])
            self.counts[i] += 1
            self.mean[i].lerp_(flat, 1 - beta1)
            self.square[i].mul_(beta2).addcmul_(flat, flat, value=1 - beta2)
            unbiased = self.square[i] / (1 - beta2 ** self.counts[i])
            total += self.mean[i] / (1 - beta1 ** self.counts[i]) / (unbiased.sqrt() + self.eps)
            present += 1
        if not present:
            return
        parts = (total * (-self.lr / present)).split([p.numel() for p in self.parameters])
        for p, part in zip(self.parameters, parts, strict=True):
            p.add_(part.view_as(p))

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.clone(), "square": self.square.clone(), "counts": list(self.counts), "lr": self.lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])
        self.counts, self.lr = list(state["counts"]), state["lr"]
