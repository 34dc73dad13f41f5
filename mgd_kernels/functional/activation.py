"""Pointwise functions: value, gradient, and gradient of the gradient, one pass over memory each.

gy, gx are cotangents of y = f(x) and x; c that of gx; ggy that of gy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mgd_kernels.backends import triton_nn
from mgd_kernels.backends.cpu import _core
from mgd_kernels.functional import _library
from mgd_kernels.functional._library import (
    DOUBLE_BACKWARD,
    FORWARD,
    addresses,
    channels_last,
    contiguous,
    elementwise,
    like,
    operator,
    served,
    twice,
)

# The codes of mgd::Function (csrc/nn/kernels.h).
_FUNCTIONS = {"gelu": 0, "gelu_tanh": 1, "silu": 2, "tanh": 3, "sigmoid": 4}


def _call(pass_, function, x, gy=None, c=None, y=None, slope=None, gx=None, ggy=None) -> None:
    tensors = (x, gy, c, y, slope, gx, ggy)
    if _library.on_gpu(x):
        return triton_nn.activation(pass_, function, *tensors)
    _core().nn_activation(pass_, _FUNCTIONS[function], x.numel(), *addresses(tensors), torch.get_num_threads())


def _value(x, function):
    (x,) = contiguous(x.shape, x)
    y = torch.empty_like(x)
    _call(FORWARD, function, x, y=y)
    return y


def _with_slope(x, function):
    (x,) = contiguous(x.shape, x)
    y, slope = torch.empty_like(x), torch.empty_like(x)
    _call(FORWARD, function, x, y=y, slope=slope)
    return y, slope


def _backward(gy, slope, x, function):
    return torch.mul(*contiguous(x.shape, gy, slope))


def _double_backward(c, gy, slope, x, function):
    c, gy, slope, x = contiguous(x.shape, c, gy, slope, x)
    ggy, gx = torch.empty_like(x), torch.empty_like(x)
    _call(DOUBLE_BACKWARD, function, x, gy=gy, c=c, slope=slope, gx=gx, ggy=ggy)
    return ggy, gx


def _differentiate(ctx, gy, _slope):
    if gy is None:
        return None, None
    x, slope = ctx.saved_tensors
    return activation_backward(gy, slope, x, ctx.arguments[1]), None


def _differentiate_twice(ctx, c):
    if c is None:
        return None, None, None, None
    gy, slope, x = ctx.saved_tensors
    ggy, gx = activation_double_backward(c, gy, slope, x, ctx.arguments[3])
    return ggy, None, gx, None  # the slope is a function of x, whose cotangent holds it all


_TORCH = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def _plain_double_backward(c, gy, slope, x, function):
    return twice(_TORCH[function], [x], [gy], [c])


activation_with_slope = operator(
    "activation_with_slope(Tensor x, str function) -> (Tensor, Tensor)",
    _with_slope,
    lambda x, function: (like(x), like(x)),
    lambda args, out: (args[0], out[1]),
    _differentiate,
    non_differentiable=slice(1, 2),
    gpu=True,
    batch=elementwise,
)
activation_backward = operator(
    "activation_backward(Tensor gy, Tensor slope, Tensor x, str function) -> Tensor",
    _backward,
    lambda gy, slope, x, function: like(x),
    lambda args, gx: args[:3],
    _differentiate_twice,
    gpu=True,
    batch=elementwise,
)
activation_double_backward = operator(
    "activation_double_backward(Tensor c, Tensor gy, Tensor slope, Tensor x, str function) -> (Tensor, Tensor)",
    _double_backward,
    lambda c, gy, slope, x, function: (like(x), like(x)),
    plain=_plain_double_backward,
    gpu=True,
    batch=elementwise,
)


# Where a derivative may be needed, one pass computes both f(x) and f'(x), which saves every later pass an exponential.
activation = operator(
    "activation(Tensor x, str function) -> Tensor",
    _value,
    lambda x, function: like(x),
    differentiable=lambda x, function: activation_with_slope(x, function)[0],
    gpu=True,
    batch=elementwise,
)


def _fits(input: Tensor) -> bool:
    return served(input, gpu=True) and not channels_last(input)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """As `torch.nn.functional.gelu`."""
    if approximate in ("none", "tanh") and _fits(input):
        return activation(input, "gelu" if approximate == "none" else "gelu_tanh")
    return F.gelu(input, approximate=approximate)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """As `torch.nn.functional.silu`."""
    return activation(input, "silu") if not inplace and _fits(input) else F.silu(input, inplace)


def tanh(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As `torch.tanh`."""
    return activation(input, "tanh") if out is None and _fits(input) else torch.tanh(input, out=out)


def sigmoid(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As `torch.sigmoid`."""
    return activation(input, "sigmoid") if out is None and _fits(input) else torch.sigmoid(input, out=out)
