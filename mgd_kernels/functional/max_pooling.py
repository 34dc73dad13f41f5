"""Max pooling, to torch's bits: of equal values the first in a window counts, of NaN the last.

With `which` of a window's elements each output is, a byte, everything else is linear: the gradient puts gy where the
largest elements were, and the gradient of that takes its cotangent from there. Two operators, each the derivative of
the other, at any order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_kernels.backends.cpu import _core
from mgd_kernels.errors import BadArgument
from mgd_kernels.functional._library import (
    BACKWARD,
    DOUBLE_BACKWARD,
    FORWARD,
    addresses,
    by_rows,
    channels_last,
    dense,
    operator,
    served,
)

_WINDOWS = {(2, 2, 0), (3, 2, 1), (3, 1, 1)}  # kernel, stride, padding
_DTYPES = (torch.float32, torch.float64)


def _shape(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[int, ...]:
    """Of one element a window."""
    return *x.shape[:-2], *((size + 2 * padding - kernel) // stride + 1 for size in x.shape[-2:])


def _run(pass_: int, x: Tensor, y: Tensor, which: Tensor, window: tuple[int, ...]) -> None:
    """Of contiguous tensors: checked, since the kernels take addresses."""
    if not (
        x.dtype in _DTYPES
        and y.dtype is x.dtype
        and which.dtype is torch.uint8
        and _shape(x, *window) == y.shape == which.shape
        and x.numel() * y.numel() > 0
    ):
        raise BadArgument(
            "expected float32 or float64 [..., height, width], its windows, and their places in uint8; got "
            f"{x.dtype} {list(x.shape)}, {y.dtype} {list(y.shape)} and {which.dtype} {list(which.shape)}"
        )
    sizes = math.prod(x.shape[:-2]), *x.shape[-2:], *window
    _core().nn_max_pool(pass_, x.dtype is torch.float64, sizes, *addresses((x, y, which)), torch.get_num_threads())


def _checked(*window: int) -> tuple[int, ...]:
    if window not in _WINDOWS:
        raise BadArgument(f"expected (kernel, stride, padding) of {sorted(_WINDOWS)}; got {window}")
    return window


def _pool(x, *window):
    window, (x,) = _checked(*window), dense(x)
    shape = _shape(x, *window)
    if min(shape) < 1:
        raise BadArgument(f"expected at least one window {window} in every plane; got {list(x.shape)}")
    y, which = x.new_empty(shape), x.new_empty(shape, dtype=torch.uint8)
    _run(FORWARD, x, y, which, window)
    return y, which


def _put(y, which, height, width, *window):
    window, (y, which) = _checked(*window), dense(y, which)
    x = y.new_empty(*y.shape[:-2], height, width)
    _run(BACKWARD, x, y, which, window)
    return x


def _take(x, which, *window):
    window, (x, which) = _checked(*window), dense(x, which)
    y = x.new_empty(which.shape)
    _run(DOUBLE_BACKWARD, x, y, which, window)
    return y


def _differentiate_pool(ctx, gy, _which):
    if gy is None:
        return (None,) * 4
    x, which = ctx.saved_tensors
    return max_put(gy, which, *x.shape[-2:], *ctx.arguments[1:]), *(None,) * 3


def _differentiate_put(ctx, c):
    (which,) = ctx.saved_tensors
    return None if c is None else max_take(c, which, *ctx.arguments[4:]), *(None,) * 6


def _differentiate_take(ctx, gy):
    x, which = ctx.saved_tensors
    return None if gy is None else max_put(gy, which, *x.shape[-2:], *ctx.arguments[2:]), *(None,) * 4


_WINDOW = "int kernel, int stride, int padding"

max_pool = operator(
    f"max_pool2d(Tensor x, {_WINDOW}) -> (Tensor, Tensor)",
    _pool,
    lambda x, *window: (x.new_empty(_shape(x, *window)), x.new_empty(_shape(x, *window), dtype=torch.uint8)),
    lambda args, out: (args[0], out[1]),
    _differentiate_pool,
    non_differentiable=slice(1, 2),
    batch=by_rows,
)
max_put = operator(
    f"max_pool2d_put(Tensor y, Tensor which, SymInt height, SymInt width, {_WINDOW}) -> Tensor",
    _put,
    lambda y, which, height, width, *_: y.new_empty(*y.shape[:-2], height, width),
    lambda args, out: args[1:2],
    _differentiate_put,
    batch=by_rows,
)
max_take = operator(
    f"max_pool2d_take(Tensor x, Tensor which, {_WINDOW}) -> Tensor",
    _take,
    lambda x, which, *window: x.new_empty(which.shape),
    lambda args, out: args[:2],
    _differentiate_take,
    batch=by_rows,
)


def max_pool2d(
    input: Tensor,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] | None = None,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """As `torch.nn.functional.max_pool2d` and `torch.max_pool2d`; the windows that are fused: 2 × 2 side by side, and 3
    × 3 with padding 1 at steps of 1 or 2, in float32 and float64 on the CPU, where channels do not lie last."""
    window = _one(kernel_size), _one(kernel_size if stride is None or stride == () else stride), _one(padding)
    if (
        window in _WINDOWS
        and _one(dilation) == 1
        and not ceil_mode
        and not return_indices
        and served(input, dtypes=_DTYPES)
        and input.ndim in (3, 4)
        and not channels_last(input)
        and min(input.shape[-2:]) >= 2
    ):
        return max_pool(input, *window)[0]
    rest: Any = kernel_size, stride, padding, dilation, ceil_mode, return_indices
    return F.max_pool2d(input, *rest)


def _one(value: int | tuple[int, ...]) -> int | None:
    """The number that a pair repeats."""
    first, *rest = (value,) if isinstance(value, int) else tuple(value)
    return first if rest in ([], [first]) else None
