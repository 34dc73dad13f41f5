"""A ResNet-9-style network for small images, with the choices that decide how smooth its training is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mgd.errors import BadArgument
from mgd.recipes.models.residual import Residual, dropouts

NORMS, POOLS, ORDERS = ("group", "batch", "none"), ("average", "max"), ("norm-first", "activation-first")


class Scaled(nn.Module):
    """The output of a module, times a constant: a smaller final output trains more smoothly (arXiv 2503.13751, 4.2)."""

    def __init__(self, body: nn.Module, scale: float):
        super().__init__()
        self.body, self.scale = body, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.body(x)


def resnet9(
    norm: str = "group",
    width: int = 16,
    classes: int = 10,
    channels: int = 3,
    *,
    pool: str = "average",
    order: str = "norm-first",
    scale: float = 1.0,
    activation: type[nn.Module] = nn.GELU,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Images `[B, channels, H, W]`, H and W at least 8, to logits `[B, classes]`: four stages, two residual blocks.

    norm: "group", "batch" or "none". width: channels of the first stage, a multiple of 8. pool: "average" or "max".
    order: does the norm stand before the activation or after it? scale: factor of the logits. dropout: its
    rate, between the convolutions of a residual block (Zagoruyko & Komodakis 2016, arXiv 1605.07146) and before the
    last layer.
    """
    for name, value, known in (("norm", norm, NORMS), ("pool", pool, POOLS), ("order", order, ORDERS)):
        if value not in known:
            raise BadArgument(f"expected {name} to be one of {list(known)}; got {value!r}")
    if width < 8 or width % 8:
        raise BadArgument(f"expected width to be a multiple of 8; got {width}")

    def block(i: int, o: int, pooled: bool = False) -> nn.Sequential:
        after: list[nn.Module] = [_norm(norm, o), activation()]
        if order == "activation-first":
            after.reverse()
        layers: list[nn.Module] = [nn.Conv2d(i, o, 3, padding=1, bias=norm == "none"), *after]
        return nn.Sequential(*layers, *([_pool(pool)] if pooled else []))

    w = width
    head: nn.Module = nn.Linear(8 * w, classes)
    return nn.Sequential(
        block(channels, w),
        block(w, 2 * w, pooled=True),
        Residual(nn.Sequential(block(2 * w, 2 * w), *dropouts(dropout), block(2 * w, 2 * w))),
        block(2 * w, 4 * w, pooled=True),
        block(4 * w, 8 * w, pooled=True),
        Residual(nn.Sequential(block(8 * w, 8 * w), *dropouts(dropout), block(8 * w, 8 * w))),
        nn.AdaptiveAvgPool2d(1) if pool == "average" else nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        *dropouts(dropout),
        head if scale == 1.0 else Scaled(head, scale),
    )


def _norm(kind: str, channels: int) -> nn.Module:
    kinds: dict[str, Any] = {"batch": nn.BatchNorm2d, "group": lambda n: nn.GroupNorm(n // 8, n)}
    return kinds[kind](channels) if kind in kinds else nn.Identity()


def _pool(kind: str) -> nn.Module:
    return nn.AvgPool2d(2) if kind == "average" else nn.MaxPool2d(2)
