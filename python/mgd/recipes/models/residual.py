"""A module and what goes around it."""

from __future__ import annotations

from torch import Tensor, nn


class Residual(nn.Module):
    """x to x + body(x)."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def dropouts(rate: float) -> list[nn.Module]:
    """A dropout of this rate, as a part of a list of layers; none where the rate is 0."""
    return [nn.Dropout(rate)] if rate else []
