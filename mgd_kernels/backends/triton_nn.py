"""Launches of `triton_nn_kernels`: what csrc/nn does on a CPU, for the same arguments, on a GPU's current stream."""

from __future__ import annotations

import contextlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mgd_kernels.backends import triton

FORWARD, BACKWARD, DOUBLE_BACKWARD = range(3)  # of mgd::Pass (csrc/nn/kernels.h)


@cache
def _kernels() -> ModuleType:
    from mgd_kernels.backends import triton_nn_kernels

    return triton_nn_kernels


def serves(width: int | None = None) -> bool:
    """Whether there are kernels, for rows of this width."""
    return _there() and (width is None or 0 < width <= _kernels().WIDEST)


@cache
def _there() -> bool:
    return triton.unavailable() is None


def _on(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _options(block: int) -> dict[str, object]:
    if triton.interpreted():
        return {}
    from triton.runtime import driver

    return _options_of(block, driver.active)


@cache
def _options_of(block: int, driver: Any) -> dict[str, object]:
    return _kernels().options(block, driver.get_current_target().backend)


def _power(width: int) -> int:
    return 1 << max(0, width - 1).bit_length()


def activation(
    pass_: int, function: str, x: Tensor, gy: Tensor | None = None, c: Tensor | None = None, y: Tensor | None = None,
    slope: Tensor | None = None, gx: Tensor | None = None, ggy: Tensor | None = None,
) -> None:  # fmt: skip
    """FORWARD fills y, and slope where it is given; DOUBLE_BACKWARD fills gx and ggy. Contiguous float32."""
    kernels, n = _kernels(), x.numel()
    block = kernels.BLOCK
    grid, how = (-(-n // block),), {"FUNCTION": function, "BLOCK": block, **_options(block)}
    with _on(x):
        if pass_ == FORWARD:
            kernels.activation_kernel[grid](x, y, slope, n, **how)
        else:
            kernels.activation_twice_kernel[grid](x, gy, c, slope, gx, ggy, n, **how)


def row_norm(
    centred: bool, pass_: int, x: Tensor, width: int, eps: float, *, weight: Tensor | None = None,
    bias: Tensor | None = None, gy: Tensor | None = None, c: Tensor | None = None, cw: Tensor | None = None,
    cb: Tensor | None = None, mean: Tensor | None = None, rstd: Tensor | None = None, y: Tensor | None = None,
    gx: Tensor | None = None, ggy: Tensor | None = None, gw: Tensor | None = None, gb: Tensor | None = None,
) -> None:  # fmt: skip
    """Layer norm, or where not `centred` RMS norm. Contiguous float32: x `[..., width]`, mean and rstd `[rows]`."""
    kernels, rows, block = _kernels(), x.numel() // width, _power(width)
    how = {"CENTRED": centred, "BLOCK": block, **_options(block)}
    count, programs = float(width), -(-rows // kernels.ROWS.value)
    with _on(x):
        if pass_ == FORWARD:
            kernels.norm_kernel[(rows,)](x, weight, bias, mean, rstd, y, width, count, eps, **how)
            return
        parts = [x.new_empty(programs, width) for _ in range(2)]
        if pass_ == BACKWARD:
            kernels.norm_backward_kernel[(programs,)](
                x, weight, gy, mean, rstd, gx, *parts, rows, width, count, **how
            )  # fmt: skip
        else:
            kernels.norm_twice_kernel[(programs,)](
                x, weight, gy, c, cw, cb, mean, rstd, gx, ggy, parts[0], rows, width, count, **how
            )  # fmt: skip
        for out, part in zip((gw, gb), parts, strict=True):
            if out is not None:
                torch.sum(part, 0, out=out)


def softmax(
    pass_: int, scale: float, causal: bool, mask: Tensor | None = None, x: Tensor | None = None,
    gp: Tensor | None = None, c: Tensor | None = None, p: Tensor | None = None, gx: Tensor | None = None,
    ggp: Tensor | None = None, again: Tensor | None = None,
) -> None:  # fmt: skip
    """Over the last dimension of contiguous float32 tensors; mask as in `functional.attention`."""
    assert p is not None
    kernels, width = _kernels(), p.shape[-1]
    rows, period, block = p.numel() // width, p.shape[-2] if causal else 0, _power(width)
    how = {"BLOCK": block, **_options(block)}
    with _on(p):
        if pass_ == FORWARD:
            sizes = (1, 1, 0, 0, 0) if mask is None else (*p.shape[1:3], *mask.expand(p.shape).stride()[:3])
            kernels.softmax_kernel[(rows,)](x, mask, p, width, period, *sizes, scale, **how)
        elif pass_ == BACKWARD:
            kernels.softmax_backward_kernel[(rows,)](p, gp, gx, width, scale, **how)
        else:
            kernels.softmax_twice_kernel[(rows,)](p, gp, c, ggp, again, width, period, scale, **how)
