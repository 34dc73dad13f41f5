"""Launches of `triton_channel_kernels`, on a GPU's current stream. Nothing waits for the device."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mgd_kernels.backends.triton_nn import BACKWARD, FORWARD, _on, _options, _power


@cache
def _kernels() -> ModuleType:
    from mgd_kernels.backends import triton_channel_kernels

    return triton_channel_kernels


def channel_norm(
    pass_: int, x: Tensor, groups: int, eps: float, *, weight: Tensor | None = None, bias: Tensor | None = None,
    gy: Tensor | None = None, c: Tensor | None = None, cw: Tensor | None = None, cb: Tensor | None = None,
    gmean: Tensor | None = None, gvar: Tensor | None = None, mean: Tensor | None = None, var: Tensor | None = None,
    rstd: Tensor | None = None, y: Tensor | None = None, gx: Tensor | None = None, ggy: Tensor | None = None,
    ggmean: Tensor | None = None, ggvar: Tensor | None = None, gw: Tensor | None = None, gb: Tensor | None = None,
) -> None:  # fmt: skip
    """Group norm, or batch norm where `groups` is 0, of contiguous float32 tensors; as `functional.norm` has them."""
    kernels, (batch, channels) = _kernels(), x.shape[:2]
    inner = x.numel() // (batch * channels)
    sets, pieces = (batch * groups, channels // groups) if groups else (channels, batch)
    columns = min(_power(inner), kernels.BLOCK)
    rows = min(_power(pieces), kernels.BLOCK // columns)
    how: dict[str, Any] = {"GROUPED": groups > 0, "PIECES": rows, "INNER": columns, **_options(rows * columns)}
    sizes = pieces, channels, inner, float(pieces * inner)
    with _on(x):
        if pass_ == FORWARD:
            kernels.channel_norm_kernel[(sets,)](x, weight, bias, mean, var, rstd, y, *sizes, eps, **how)
            return
        parts = [x.new_empty(batch, channels) for _ in range(2 if pass_ == BACKWARD else 1)]
        if pass_ == BACKWARD:
            kernels.channel_norm_backward_kernel[(sets,)](
                x, weight, gy, gmean, gvar, mean, rstd, gx, *parts, *sizes, **how
            )  # fmt: skip
        else:
            kernels.channel_norm_twice_kernel[(sets,)](
                x, weight, gy, gvar, c, cw, cb, mean, rstd, gx, ggy, ggmean, ggvar, *parts, *sizes, **how
            )  # fmt: skip
        for out, part in zip((gw, gb), parts, strict=False):
            if out is not None:
                torch.sum(part, 0, out=out)
